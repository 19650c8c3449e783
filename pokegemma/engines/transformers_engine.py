"""A checkpoint under transformers, the reference of all exports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.engines.engine import SOFT_TOKEN
from pokegemma.engines.questions import Question
from pokegemma.gemma.cached_conversation import Conversation
from pokegemma.gemma.families import require_exact, stop_tokens
from pokegemma.gemma.image_attention import trained_attention
from pokegemma.gemma.loading import Checkpoint, default_device
from pokegemma.gemma.text.checkpoint import open_gemma
from pokegemma.gemma.vision_tower import encode_pictures


class TransformersEngine:
    """A merged checkpoint of Gemma 3, by the code that training and evaluation load it with; see `Engine`.

    One for text alone takes questions without pictures.

    Raises:
        PokegemmaError: it cannot be loaded, is an adapter, or belongs to another family.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        image_attention: str | None = None,
    ) -> None:
        """Load the checkpoint.

        Args:
            dtype: float32, bfloat16, or auto for the stored type.
            image_attention: "causal" or "bidirectional"; None: the one in config.json, else bidirectional.
        """
        checkpoint = open_gemma(folder)
        config, has_vision = checkpoint.config, isinstance(checkpoint, Checkpoint)
        if has_vision:
            require_exact(config, "comparing exports")
        if dtype == "auto":
            dtype = str(config.dtype or "float32").removeprefix("torch.")
        self.name = f"transformers {dtype}"
        self._causal = has_vision and (image_attention or trained_attention(config)) == "causal"
        self._model = checkpoint.load_model(dtype=dtype, device=default_device() if device is None else device)
        self.weights = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[self._model.dtype]
        self._processor = checkpoint.processor if has_vision else None
        self._tokenizer = self._processor.tokenizer if has_vision else checkpoint.tokenizer
        self._last: tuple[Question, Conversation] | None = None

    def prompt_tokens(self, question: Question) -> list[int]:
        soft = None if self._processor is None else self._tokenizer.image_token_id
        return [SOFT_TOKEN if token == soft else token for token in self._tokenize(question)]

    def read(self, question: Question, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        conversation = self._begin(question)
        return [conversation.read(tokens).float().log_softmax(-1).cpu().numpy() for tokens in continuations]

    def write(self, question: Question, *, max_new_tokens: int) -> list[int]:
        stops = stop_tokens(self._tokenizer)
        written = self._begin(question).generate(stops=stops, max_new_tokens=max_new_tokens)
        return written[:-1] if written[-1] in stops else written

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def pixels(self, question: Question) -> torch.Tensor:
        """Return the input of the vision tower, (pictures, 3, height, width) float32."""
        # Pan-and-scan would add crops, for which the prompt has no tokens.
        return self._processor.image_processor(list(question.pictures), return_tensors="pt", do_pan_and_scan=False)[
            "pixel_values"
        ]

    def _tokenize(self, question: Question) -> list[int]:
        processor = self._processor or self._tokenizer
        text = processor.apply_chat_template(list(question.messages), tokenize=False, add_generation_prompt=True)
        if self._processor is not None:
            text = text.replace(processor.boi_token, processor.full_image_sequence)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the BOS already

    def _begin(self, question: Question) -> Conversation:
        """Return the conversation after the prompt; the one of the last question is kept for the next call."""
        if self._last is None or self._last[0] is not question:
            tokens = self._tokenize(question)
            conversation = Conversation(self._model)
            if self._processor is None:
                conversation.say(tokens, torch.zeros(len(tokens), dtype=torch.long), None)
            else:
                is_soft = torch.tensor([token == self._tokenizer.image_token_id for token in tokens]).long()
                with torch.inference_mode():
                    pixels = self.pixels(question).to(device=self._model.device, dtype=self._model.dtype)
                    pictures = BaseModelOutputWithPooling(pooler_output=encode_pictures(self._model.model, pixels))
                conversation.say(tokens, torch.zeros_like(is_soft) if self._causal else is_soft, pictures)
            self._last = question, conversation
        return self._last[1]
