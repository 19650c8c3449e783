"""Run a folder for MLX with mlx-vlm: on the GPU of a Mac, on the CPU elsewhere."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor

from pokegemma.engines.engine import SOFT_TOKEN
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError, one_line

_STOCK_LOADER = AutoProcessor.__dict__["from_pretrained"]
try:
    import mlx.core as mx
    import mlx_vlm.models.gemma3  # noqa: F401  puts its own loader into transformers' AutoProcessor
    from mlx_vlm.generate import DEFAULT_PREFILL_STEP_SIZE
    from mlx_vlm.utils import load_model, load_processor
except ImportError as error:
    raise PokegemmaError(f"MLX cannot be used ({error}); install it with: ./init.sh --with mlx") from error
_MLX_LOADER = AutoProcessor.__dict__["from_pretrained"]
AutoProcessor.from_pretrained = _STOCK_LOADER


@contextlib.contextmanager
def mlx_processors() -> Iterator[None]:
    """Let `AutoProcessor` load what mlx-vlm expects while a block runs.

    mlx-vlm changes it for the whole process: every Gemma 3 processor would lose its chat template.
    """
    AutoProcessor.from_pretrained = _MLX_LOADER
    try:
        yield
    finally:
        AutoProcessor.from_pretrained = _STOCK_LOADER


def open_processor(folder: Path) -> Any:
    """Return the processor that mlx-vlm takes from a folder.

    Raises:
        PokegemmaError: there is none, or it has no chat template.
    """
    try:
        with mlx_processors():
            processor = load_processor(folder, add_detokenizer=False)
    except (OSError, ValueError, KeyError) as error:
        raise PokegemmaError(f"{folder}: no processor: {' '.join(str(error).split())[:200]}") from error
    if not getattr(processor, "tokenizer", None) or not processor.tokenizer.chat_template:
        raise PokegemmaError(f"{folder}: no chat template in it")
    return processor


def open_model(folder: Path, *, lazy: bool = False) -> Any:
    """Return the model in a folder, its weights left on disk until needed where `lazy`.

    Raises:
        PokegemmaError: there is none, it is damaged, or it is not a Gemma 3 with vision.
    """
    if not folder.is_dir():
        raise PokegemmaError(f"{folder}: no such folder")
    for needed in ("config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise PokegemmaError(f"{folder}: no {needed} in it")
    try:
        model = load_model(folder, lazy=lazy)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = one_line(error)
        raise PokegemmaError(f"{folder}: mlx-vlm cannot load it, is it complete? {reason}") from error
    # mlx-vlm only warns where a part has no weights at all.
    if model.model_type != "gemma3" or model.vision_tower is None or model.multi_modal_projector is None:
        raise PokegemmaError(f"{folder}: not a Gemma 3 with its vision tower and projector")
    return model


def prepare(processor: Any, question: Question) -> tuple[mx.array, mx.array | None]:
    """Return a prompt's tokens (1, length), and its pictures (pictures, 3, height, width), None where it has none."""
    text = processor.tokenizer.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
    pictures = [list(question.pictures)] if question.pictures else None
    inputs = processor(text=[text], images=pictures, add_special_tokens=False)
    pixels = inputs.get("pixel_values")
    return mx.array(inputs["input_ids"]), None if pixels is None else mx.array(np.asarray(pixels))


class MlxEngine:
    """A folder for MLX under mlx-vlm; an `Engine`.

    It computes in the type of the stored weights and processes the prompt in steps, as mlx-vlm's own programs do.

    Raises:
        PokegemmaError: mlx-vlm is missing, or the folder is not one that it can run.
    """

    name = "mlx"

    def __init__(self, folder: Path) -> None:
        self._model = open_model(folder)
        self._processor = open_processor(folder)
        config = self._model.config
        self._soft_token = config.image_token_index
        ends = config.eos_token_id
        self._stops = {ends} if isinstance(ends, int) else set(ends)

    @property
    def weights(self) -> str:
        """The bits of the language model's quantised layers, "4 bits", or the type of its weights, "bf16"."""
        layer = self._model.language_model.model.layers[0].self_attn.q_proj
        if bits := getattr(layer, "bits", None):
            return f"{bits} bits"
        return {mx.bfloat16: "bf16", mx.float16: "f16", mx.float32: "f32"}[layer.weight.dtype]

    def prompt_tokens(self, question: Question) -> list[int]:
        tokens = prepare(self._processor, question)[0][0].tolist()
        return [SOFT_TOKEN if token == self._soft_token else token for token in tokens]

    def read(self, question: Question, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        first, prompt_cache = self._read_prompt(question)
        rows = []
        for tokens in continuations:
            logits = [first]
            if len(tokens) > 1:
                cache = _fork(prompt_cache)
                logits.append(self._logits(mx.array([tokens[:-1]]), cache))
            rows.append(_log_probabilities(mx.concatenate(logits))[: len(tokens)])
        return rows

    def write(self, question: Question, *, max_new_tokens: int) -> list[int]:
        logits, cache = self._read_prompt(question)
        written: list[int] = []
        while len(written) < max_new_tokens:
            token = mx.argmax(logits[-1]).item()
            if token in self._stops:
                break
            written.append(token)
            logits = self._logits(mx.array([[token]]), cache)
        return written

    def text(self, tokens: Sequence[int]) -> str:
        return self._processor.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _read_prompt(self, question: Question) -> tuple[mx.array, list[Any]]:
        """Return the logits (1, vocabulary) after a prompt, and the cache of its keys and values."""
        tokens, pixels = prepare(self._processor, question)
        embeddings = self._model.get_input_embeddings(tokens, pixels, mask=mx.ones_like(tokens)).inputs_embeds
        cache = self._model.language_model.make_cache()
        last = tokens.shape[1] - 1
        for start in range(0, last, DEFAULT_PREFILL_STEP_SIZE):
            stop = min(start + DEFAULT_PREFILL_STEP_SIZE, last)
            # The logits of this step are not used, so MLX does not compute them.
            self._model.language_model(tokens[:, start:stop], inputs_embeds=embeddings[:, start:stop], cache=cache)
            mx.eval([layer.state for layer in cache])
        return self._logits(tokens[:, last:], cache, embeddings[:, last:]), cache

    def _logits(self, tokens: mx.array, cache: list[Any], embeddings: mx.array | None = None) -> mx.array:
        """Append tokens (1, length) to `cache`, and return the logits (length, vocabulary) at them."""
        return self._model.language_model(tokens, inputs_embeds=embeddings, cache=cache).logits[0]


def _fork(cache: list[Any]) -> list[Any]:
    """Return a copy of a cache to continue from. The original cannot be trimmed: sliding layers drop old tokens."""
    return copy.deepcopy(cache)


def _log_probabilities(logits: mx.array) -> np.ndarray:
    logits = logits.astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
