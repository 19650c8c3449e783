"""Predict decisions in two ways: generate the whole answer, or score the eight buttons."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Gemma3ForConditionalGeneration, GenerationConfig, PreTrainedTokenizerBase

from pokegemma.data.prompts import AnswerError, Layout, parse_answer, sample_images
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.base import open_base
from pokegemma.gemma.adapters.reading import CONFIG_FILE, read_adapter
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.gemma.button_scores import checked_scores, encoded_pictures, score_buttons, score_by_rows
from pokegemma.gemma.families import family_of, require_exact, stop_tokens
from pokegemma.gemma.loading import default_device, open_checkpoint

logger = logging.getLogger(__name__)

_NUM_WARM_UPS = 2


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer that the model wrote.

    `button` is None where `text` is not an answer. `complete` is false where `max_new_tokens` cut it off.
    """

    text: str
    button: str | None
    complete: bool


@dataclass(frozen=True)
class Predictions:
    """What a model predicted for N decisions, in order.

    Attributes:
        answers: written answers; None where generation was left out.
        scores: probabilities (N, 8) of the buttons.
        latency_s: seconds of single decisions, for "generated" and "scored".
    """

    answers: list[GeneratedAnswer] | None
    scores: np.ndarray
    latency_s: dict[str, list[float]]


@torch.inference_mode()
def generate_answers(
    model: Gemma3ForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
) -> list[GeneratedAnswer]:
    """Return the greedy answer to each of a batch of left-padded prompts on the model's device."""
    stops = stop_tokens(tokenizer)
    # Not the checkpoint's config: those of published checkpoints sample.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    if "image_index" not in batch:  # a batch of another family, as its own forward takes it
        inputs = {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        inputs["mm_encoder_outputs"] = {"image": encoded_pictures(model, batch)}
    written = model.generate(**inputs, generation_config=config)
    return [read_answer(row, tokenizer) for row in written[:, batch["input_ids"].shape[1] :].tolist()]


def read_answer(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> GeneratedAnswer:
    """Return the answer in a row of generated tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    try:
        button = parse_answer(text).button
    except AnswerError:
        button = None
    return GeneratedAnswer(text=text, button=button, complete=not set(stop_tokens(tokenizer)).isdisjoint(tokens))


@dataclass(frozen=True)
class Predictor:
    """A loaded model and the collator that shows samples to it."""

    model: Gemma3ForConditionalGeneration
    collator: Collator
    max_new_tokens: int = 256

    def generate(self, samples: Sequence[Sample]) -> list[GeneratedAnswer]:
        """Return the model's written answer to each sample, all in one batch."""
        return self._generate(self._prompts(samples))

    def score(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the probabilities (N, 8) of the buttons for each sample, all in one batch."""
        return self._score(self._prompts(samples))

    def predict(
        self, samples: Sequence[Sample], *, batch_size: int, generate: bool = True
    ) -> tuple[list[GeneratedAnswer] | None, np.ndarray]:
        """Return the written answers (None without `generate`) and the probabilities (N, 8), with a progress bar."""
        answers, scores = [], []
        with tqdm(total=len(samples), desc="evaluate", unit="decision") as progress:
            for start in range(0, len(samples), batch_size):
                chunk = samples[start : start + batch_size]
                batch = self._prompts(chunk)  # pictures are read once for both
                scores.append(self._score(batch))
                if generate:
                    answers += self._generate(batch)
                progress.update(len(chunk))
        return answers if generate else None, np.concatenate(scores)

    def use_features(self, folder: Path, examples: Sequence[Example]) -> None:
        """Take the pictures of `examples` from a feature cache from now on, and encode those that it lacks.

        Raises:
            PokegemmaError: the cache is of another model or cannot be written, or the model is not a Gemma 3.
        """
        require_exact(self.model.config, "--vision_features")
        collator = self.collator
        paths = (collator.dataset_folder / path for example in examples for path in collator.picture_paths(example))
        device = self.model.device
        collator.features = prepare_cache(folder, self.model, collator.processor, map(str, paths), device=device)

    def _prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.model.device) for name, tensor in self.collator.prompts(samples).items()}

    def _generate(self, batch: dict[str, torch.Tensor]) -> list[GeneratedAnswer]:
        tokenizer = self.collator.processor.tokenizer
        return generate_answers(self.model, batch, tokenizer, max_new_tokens=self.max_new_tokens)

    def _score(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        score = score_by_rows if family_of(self.model.config).inexact else score_buttons
        return checked_scores(score(self.model, batch, self.collator.button_tokens))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def require_pictures(samples: Sequence[Sample], *, layout: Layout, dataset_folder: Path) -> None:
    """Check, before a model is loaded, that every picture that `layout` shows exists.

    Raises:
        PokegemmaError: a picture is missing, or a sample has none for this layout.
    """
    paths = {path for sample in samples for path in sample_images(sample, layout)}
    missing = sorted(path for path in paths if not _is_file(dataset_folder / path))
    if missing:
        named = ", ".join(missing[:3])
        raise PokegemmaError(f"{dataset_folder}: {len(missing)} of {len(paths)} pictures not found: {named}")


def measure_latency(decide: Callable[[Sequence[Sample]], object], samples: Sequence[Sample]) -> list[float]:
    """Return the seconds that `decide` takes for each sample alone, after a warm-up; they include reading pictures."""
    for sample in samples[:_NUM_WARM_UPS]:
        decide([sample])
    durations = []
    for sample in samples:
        start = time.perf_counter()
        decide([sample])  # returns a Python value, so no work is left running on a GPU
        durations.append(time.perf_counter() - start)
    return durations


def load_predictor(
    model_path: str | Path,
    *,
    layout: Layout,
    dataset_folder: Path = Path(),
    dtype: str = "auto",
    device: str | None = None,
    max_new_tokens: int = 256,
) -> Predictor:
    """Load a checkpoint, or an adapter (a folder with adapter_config.json) onto the base that it names.

    Args:
        dataset_folder: what the samples' paths are relative to; play shows pictures that are no files.
        dtype: auto is bfloat16 on a GPU that supports it, float32 elsewhere.

    Raises:
        PokegemmaError: the model, its processor or its base cannot be loaded, or there is no such device.
    """
    try:
        where = torch.device(device) if device else default_device()
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise PokegemmaError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        has_bfloat16 = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    folder = Path(model_path)
    if not (folder / CONFIG_FILE).is_file():
        checkpoint = open_checkpoint(model_path)
        model = checkpoint.load_model(dtype=dtype, device=where)
    else:
        adapter = read_adapter(folder)
        checkpoint = open_base(adapter)
        if (folder / "processor_config.json").is_file():
            checkpoint = replace(checkpoint, processor_path=str(folder))
        bare = checkpoint.load_model(dtype=dtype, device=where)
        # The base model itself, whose linear layers are wrapped: for callers it is a model without an adapter.
        model = attach_adapter(bare, adapter, checkpoint.path).get_base_model().eval()
    logger.info("%s on %s in %s", model_path, where, dtype)
    collator = checkpoint.collator(layout=layout, dataset_folder=Path(dataset_folder))
    return Predictor(model=model, collator=collator, max_new_tokens=max_new_tokens)
