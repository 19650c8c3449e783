"""A GGUF file, with or without its mmproj, as an engine: llama.cpp computes the same as in llama-server."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import mtmd_cpp
from PIL import Image

from pokegemma.engines.engine import SOFT_TOKEN
from pokegemma.engines.llama_cpp_log import captured_log
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError

_MARKER = mtmd_cpp.mtmd_default_marker().decode()


def _num_threads() -> int | None:
    """Return OMP_NUM_THREADS, which llama.cpp itself does not read; None leaves the number to llama.cpp.

    Its threads spin while they wait for each other: with more threads than free cores it is many times slower.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) else None


class LlamaCppEngine:
    """A loaded language model and, for pictures, its mmproj; on a GPU where llama.cpp was built for one.

    Call `close`, or use it in a `with` statement: Python does not free the memory of llama.cpp.
    """

    name = "llama.cpp"

    def __init__(self, model: Path, mmproj: Path | None, *, num_context: int = 8192, batch_tokens: int = 1024) -> None:
        """Load both files.

        Args:
            mmproj: None for a model for text alone.
            num_context: largest number of tokens of a prompt and its answer.
            batch_tokens: tokens processed at once; those of a picture must fit, since they attend to each other.

        Raises:
            PokegemmaError: a file is missing or damaged, or they do not belong together.
        """
        self._vision: Any = None
        self._llama: Any = None
        for file, what in (
            (model, "the language model"),
            (mmproj, "the vision part (mmproj)"),
        ):
            if file is not None and not Path(file).is_file():
                raise PokegemmaError(f"{file} not found: {what} is written by scripts/convert_to_gguf.py")
        with captured_log() as said:
            try:
                # swa_full: a sliding-window cache that drops old tokens could not be cut back to the end of the prompt.
                self._llama = llama_cpp.Llama(
                    str(model),
                    n_ctx=num_context,
                    n_batch=batch_tokens,
                    n_ubatch=batch_tokens,
                    swa_full=True,
                    n_gpu_layers=-1,
                    n_threads=_num_threads(),
                    n_threads_batch=_num_threads(),
                    verbose=False,
                )
            except ValueError as error:
                raise PokegemmaError(f"{model}: llama.cpp cannot load it: {said.last or error}") from error
            try:
                self._template = self._read_template(model)
                self._vision = None if mmproj is None else self._load_vision(mmproj, said)
            except PokegemmaError:
                self.close()
                raise

    @property
    def weights(self) -> str:
        """The type of the weights by the file's metadata, such as "Q4_K_M"; "" where it is missing."""
        stored = self._llama.metadata.get("general.file_type")
        names = [name for name, value in vars(llama_cpp).items() if "_FTYPE_" in name and str(value) == stored]
        return names[0].rpartition("MOSTLY_")[2].removeprefix("LLAMA_FTYPE_ALL_") if names else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of both; the engine cannot be used afterwards."""
        if self._vision is not None:
            mtmd_cpp.mtmd_free(self._vision)
            self._vision = None
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def _read_template(self, model: Path) -> Any:
        source = self._llama.metadata.get("tokenizer.chat_template")
        if not source:
            raise PokegemmaError(f"{model}: no chat template in it; convert an instruction-tuned checkpoint")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise PokegemmaError(f"{model}: its chat template is damaged: {error}") from error

    def _load_vision(self, mmproj: Path, said: Any) -> int:
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = llama_cpp.llama_supports_gpu_offload()
        options.n_threads = self._llama.n_threads_batch
        options.print_timings = False
        options.warmup = False
        vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self._llama.model, options)
        if vision is None:
            raise PokegemmaError(f"{mmproj}: llama.cpp cannot load it for this language model: {said.last}")
        if not mtmd_cpp.mtmd_support_vision(vision):
            mtmd_cpp.mtmd_free(vision)
            raise PokegemmaError(f"{mmproj}: contains no vision tower")
        return vision

    def _prompt(self, question: Question) -> str:
        token = self._llama.token_bos()
        # llama.cpp's servers also write a marker into the template; it adds the marks around the picture.
        picture = {"type": "text", "text": _MARKER}
        messages = [
            {**message, "content": [picture if part["type"] == "image" else part for part in message["content"]]}
            for message in question.messages
        ]
        bos_token = self._llama.detokenize([token], special=True).decode()
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, bos_token=bos_token)
        except (TemplateError, TypeError) as error:  # a template for other messages, such as those without pictures
            raise PokegemmaError(f"{question.id}: the chat template in the GGUF file fails: {error}") from error

    def _tokenize(self, question: Question) -> "_Chunks":
        return _Chunks(self._vision, self._prompt(question), question.pictures)

    def prompt_tokens(self, question: Question) -> list[int]:
        """Return the prompt's tokens, with `SOFT_TOKEN` for each token of a picture."""
        if self._vision is None:  # the template has written the BOS already
            return self._llama.tokenize(self._prompt(question).encode(), add_bos=False, special=True)
        with self._tokenize(question) as chunks:
            return chunks.tokens()

    def _empty_cache(self, question: Question, *, num_tokens: int, num_more: int) -> None:
        """Empty the cache for a prompt and what follows it."""
        if num_tokens + num_more > self._llama.n_ctx():
            raise PokegemmaError(
                f"{question.id}: {num_tokens} tokens and {num_more} more do not fit into {self._llama.n_ctx()}"
            )
        llama_cpp.llama_memory_clear(self._memory, True)

    def _read_prompt(self, question: Question, *, num_more: int) -> tuple[int, np.ndarray]:
        """Process a prompt from an empty cache; return its length and the logits (vocabulary,) after it."""
        if self._vision is None:
            tokens = self.prompt_tokens(question)
            self._empty_cache(question, num_tokens=len(tokens), num_more=num_more)
            return len(tokens), self._append(tokens, 0)[-1]
        with self._tokenize(question) as chunks, captured_log() as said:
            self._empty_cache(question, num_tokens=len(chunks.tokens()), num_more=num_more)
            position = llama_cpp.llama_pos(0)
            status = mtmd_cpp.mtmd_helper_eval_chunks(
                self._vision, self._llama.ctx, chunks.pointer, 0, 0, self._llama.n_batch, True, ctypes.byref(position)
            )
        if status != 0:
            raise PokegemmaError(f"{question.id}: llama.cpp failed with status {status}: {said.last}")
        return position.value, self._logits(-1)

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self._llama.ctx)

    def _logits(self, place: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, place)
        return np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),)).copy()

    def _append(self, tokens: Sequence[int], position: int) -> list[np.ndarray]:
        """Process tokens after what is in the cache; return the logits after each."""
        size, rows = self._llama.n_batch, []
        for start in range(0, len(tokens), size):
            rows += self._append_batch(tokens[start : start + size], position + start)
        return rows

    def _append_batch(self, tokens: Sequence[int], position: int) -> list[np.ndarray]:
        """Do the same for the tokens of one batch; with more tokens llama.cpp ends the process."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position + place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            status = llama_cpp.llama_decode(self._llama.ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise PokegemmaError(f"llama.cpp failed with status {status} on {len(tokens)} tokens after {position}")
        return [self._logits(place) for place in range(len(tokens))]

    def read(self, question: Question, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return log-probabilities (length, vocabulary) for each continuation; see `Engine.read`."""
        position, first = self._read_prompt(question, num_more=max(map(len, continuations)))
        rows = []
        for continuation in continuations:
            logits = [first]
            if len(continuation) > 1:
                logits += self._append(continuation[:-1], position)
                llama_cpp.llama_memory_seq_rm(self._memory, 0, position, -1)
            rows.append(_log_softmax(np.stack(logits)))
        return rows

    def write(self, question: Question, *, max_new_tokens: int) -> list[int]:
        """Return the tokens of the greedy answer, without the end-of-turn token."""
        position, logits = self._read_prompt(question, num_more=max_new_tokens)
        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            token = int(logits.argmax())
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            answer.append(token)
            (logits,) = self._append([token], position)
            position += 1
        return answer

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens of an answer as text."""
        return self._llama.detokenize(list(tokens)).decode(errors="replace")


class _Chunks:
    """A prompt as llama.cpp's list of texts and pictures; it is freed at the end of a `with` block."""

    def __init__(self, vision: int, prompt: str, pictures: Sequence[Image.Image]) -> None:
        self.pointer = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = [self._bitmap(picture) for picture in pictures]
        encoded = prompt.encode()
        text = mtmd_cpp.mtmd_input_text(text=encoded, text_len=len(encoded), add_special=False, parse_special=True)
        array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        status = mtmd_cpp.mtmd_tokenize(vision, self.pointer, ctypes.byref(text), array, len(bitmaps))
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)
        if status != 0:
            self.__exit__()
            slots = prompt.count(_MARKER)
            raise PokegemmaError(f"a prompt with {slots} slots for {len(pictures)} pictures cannot be cut into tokens")

    @staticmethod
    def _bitmap(picture: Image.Image) -> int:
        pixels = picture.convert("RGB").tobytes()
        buffer = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        return mtmd_cpp.mtmd_bitmap_init(picture.width, picture.height, buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        mtmd_cpp.mtmd_input_chunks_free(self.pointer)

    def tokens(self) -> list[int]:
        tokens: list[int] = []
        for index in range(mtmd_cpp.mtmd_input_chunks_size(self.pointer)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(self.pointer, index)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                values = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                tokens += values[: count.value]
            else:
                tokens += [SOFT_TOKEN] * mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        return tokens


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)
