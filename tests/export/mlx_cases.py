"""What the tests of MLX share: questions to a tiny model, and what transformers says to them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pokegemma.data import prompts
from pokegemma.engines.questions import Question

IMAGE_SIZE_PX = 112
IMAGE_TOKENS = 16


def make_question(seed: int) -> Question:
    """Return a question after an earlier answer, with three noisy pictures; it is longer than the tiny model's window.

    Its pictures are larger than one token, so that attention inside them matters.
    """
    noise = np.random.default_rng(seed).integers(0, 256, (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    answer = prompts.build_output(button="up", reasoning="the path leads up", context="navigation")
    image = {"type": "image"}
    first = [_text(prompts.build_context("go north")), image, image, _text(prompts.build_question(["left"]))]
    messages = (
        {"role": "user", "content": first},
        {"role": "assistant", "content": [_text(answer)]},
        {"role": "user", "content": [image, _text(prompts.NEXT_QUESTION)]},
    )
    return Question(id=str(seed), messages=messages, pictures=tuple(Image.fromarray(pixels) for pixels in noise))


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def answers(processor: ProcessorMixin) -> list[list[int]]:
    """Return the tokens of an answer for each button."""
    texts = [prompts.build_output(button=button, reasoning="so", context="menu") for button in prompts.BUTTONS]
    return processor.tokenizer(texts, add_special_tokens=False).input_ids


def prompt_inputs(processor: ProcessorMixin, question: Question) -> dict[str, torch.Tensor]:
    """Return what transformers makes of a question, by itself."""
    text = processor.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
    return processor(
        text=[text],
        images=[list(question.pictures)],
        add_special_tokens=False,
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )


@torch.inference_mode()
def read_with_transformers(
    model: PreTrainedModel, processor: ProcessorMixin, question: Question, tokens: Sequence[int], *, causal: bool
) -> np.ndarray:
    """Return the log-probabilities (tokens, vocabulary) at the tokens of an answer.

    Causal inside pictures is what transformers does when nobody tells it where they are.
    """
    inputs = prompt_inputs(processor, question)
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
    types = torch.nn.functional.pad(inputs["token_type_ids"], (0, len(tokens)))
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=inputs["pixel_values"],
        **({} if causal else {"token_type_ids": types}),
    ).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    return logits.float().log_softmax(-1).numpy()


def scores_of(read: Sequence[np.ndarray], continuations: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the log-probability of each of several answers."""
    pairs = zip(read, continuations, strict=True)
    return np.array([rows[np.arange(len(tokens)), list(tokens)].sum() for rows, tokens in pairs])
