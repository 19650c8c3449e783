"""Ask a model for decisions, two ways: the whole answer generated, or the eight buttons scored in one forward pass."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from tqdm import tqdm
from transformers import Gemma3ForConditionalGeneration, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from pokegemma.data.prompts import AnswerError, Layout, parse_answer, sample_images
from pokegemma.data.samples import Sample
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.training import models
from pokegemma.training.collator import ButtonTokens, Gemma3Collator

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_NUM_WARM_UPS = 2


@dataclass(frozen=True)
class GeneratedAnswer:
    """What the model wrote.

    `button` is None where `text` is not an answer. `complete` is false where `max_new_tokens` cut it off.
    """

    text: str
    button: str | None
    complete: bool


def _attention_masks(
    batch: dict[str, torch.Tensor], positions: torch.Tensor, branch: torch.Tensor, *, window: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return additive masks (batch, 1, length, length) for both kinds of text layer.

    A token sees what stands before it by position, on the trunk (branch 0) or its own branch, and all of its own
    picture; a sliding layer only the last `window` positions of that. This is what transformers builds for a plain
    row, where a token's position is its place in the row.

    Args:
        batch: left-padded; `attention_mask` and `token_type_ids` (batch, length).
        positions: (batch, length).
        branch: (length,).
    """
    picture = get_block_sequence_ids_for_mask(batch["token_type_ids"])
    same_picture = (picture[:, :, None] == picture[:, None, :]) & (picture[:, :, None] >= 0)
    before = positions[:, None, :] <= positions[:, :, None]
    related = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    visible = ((before & related) | same_picture) & batch["attention_mask"].bool()[:, None, :]
    near = positions[:, None, :] > positions[:, :, None] - window
    itself = torch.eye(len(branch), dtype=torch.bool, device=branch.device)  # a row of padding must see something

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~(allowed | itself), torch.finfo(dtype).min)[:, None]

    return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}


@torch.inference_mode()
def score_buttons(
    model: Gemma3ForConditionalGeneration, batch: dict[str, torch.Tensor], tokens: ButtonTokens
) -> torch.Tensor:
    """Return the probability (batch, 8) of each of `BUTTONS`, normalised over the eight, in one forward pass.

    The common beginning of all answers follows the prompts, then every branch that is longer than one token,
    without its last; branches share a row as a tree, each seeing the trunk and itself. So a score is the product
    of the branch's token probabilities, as if the answer had been written out in a row of its own.

    Args:
        batch: left-padded prompts, as `Gemma3Collator.prompts` makes them, on the model's device.
    """
    device = batch["input_ids"].device
    tails = [branch[:-1] for branch in tokens.branches]
    added = [*tokens.prefix, *(token for tail in tails for token in tail)]
    added_ids = torch.tensor(added, dtype=torch.long, device=device).expand(len(batch["input_ids"]), -1)
    branch_of = [0] * len(tokens.prefix) + [number for number, tail in enumerate(tails, 1) for _ in tail]
    depth = [*range(len(tokens.prefix)), *(len(tokens.prefix) + at for tail in tails for at in range(len(tail)))]

    prompt_length = batch["input_ids"].shape[1]
    prompt_positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    added_positions = prompt_positions[:, -1:] + 1 + torch.tensor(depth, dtype=torch.long, device=device)
    positions = torch.cat([prompt_positions, added_positions], 1)
    extended = {
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, len(added)), value=1),
        "token_type_ids": torch.nn.functional.pad(batch["token_type_ids"], (0, len(added)), value=0),
    }
    branch = torch.tensor([0] * prompt_length + branch_of, device=device)
    window = model.config.get_text_config().sliding_window
    trunk_end = prompt_length + len(tokens.prefix) - 1
    logits = model(
        input_ids=torch.cat([batch["input_ids"], added_ids], 1),
        pixel_values=batch["pixel_values"].to(model.dtype),
        position_ids=positions,
        attention_mask=_attention_masks(extended, positions, branch, window=window, dtype=model.dtype),
        logits_to_keep=torch.arange(trunk_end, len(branch), device=device),
        use_cache=False,
    ).logits
    log_probabilities = logits.float().log_softmax(-1)

    scores, next_tail = [], 1  # slot 0 of the logits is the trunk's last token, then tail after tail
    for tail, tokens_of_branch in zip(tails, tokens.branches, strict=True):
        slots = [0, *range(next_tail, next_tail + len(tail))]
        next_tail += len(tail)
        scores.append(log_probabilities[:, slots, list(tokens_of_branch)].sum(-1))
    return torch.stack(scores, 1).softmax(-1)


@torch.inference_mode()
def generate_answers(
    model: Gemma3ForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
) -> list[GeneratedAnswer]:
    """Return the greedy answer to each of a batch of left-padded prompts on the model's device."""
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    # A config of its own: published checkpoints ask for sampling.
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    inputs = {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
    written = model.generate(**inputs, generation_config=config)
    answers = []
    for row in written[:, batch["input_ids"].shape[1] :].tolist():
        text = tokenizer.decode(row, skip_special_tokens=True)
        try:
            button = parse_answer(text).button
        except AnswerError:
            button = None
        answers.append(GeneratedAnswer(text=text, button=button, complete=not set(stops).isdisjoint(row)))
    return answers


@dataclass(frozen=True)
class Predictor:
    """A loaded model together with the way its samples are shown to it."""

    model: Gemma3ForConditionalGeneration
    collator: Gemma3Collator
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

    def _prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.model.device) for name, tensor in self.collator.prompts(samples).items()}

    def _generate(self, batch: dict[str, torch.Tensor]) -> list[GeneratedAnswer]:
        tokenizer = self.collator.processor.tokenizer
        return generate_answers(self.model, batch, tokenizer, max_new_tokens=self.max_new_tokens)

    def _score(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        scores = score_buttons(self.model, batch, self.collator.button_tokens).double().cpu().numpy()
        if not np.isfinite(scores).all():
            raise CheckFailedError("the model gives NaN instead of probabilities: its training diverged, or overflowed")
        return scores


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def check_pictures(samples: Sequence[Sample], *, layout: Layout, dataset_folder: Path) -> None:
    """Check, before a model is loaded, that every picture that `layout` shows is there.

    Raises:
        PokegemmaError: some are not, or a sample has none for this layout.
    """
    try:
        paths = {path for sample in samples for path in sample_images(sample, layout)}
    except ValueError as error:
        raise PokegemmaError(str(error)) from error
    missing = sorted(path for path in paths if not _is_file(dataset_folder / path))
    if missing:
        named = ", ".join(missing[:3])
        raise PokegemmaError(f"{dataset_folder}: {len(missing)} of {len(paths)} pictures not found: {named}")


def measure_latency(decide: Callable[[Sequence[Sample]], object], samples: Sequence[Sample]) -> list[float]:
    """Return the seconds that `decide` takes for each sample alone, reading its pictures included, after a warm-up."""
    for sample in samples[:_NUM_WARM_UPS]:
        decide([sample])
    durations = []
    for sample in samples:
        start = time.perf_counter()
        decide([sample])  # ends with its result in Python: nothing is left running on a GPU
        durations.append(time.perf_counter() - start)
    return durations


def load_predictor(
    model_path: str | Path, *, dataset_folder: Path, layout: Layout, dtype: str = "auto", device: str | None = None,
    max_new_tokens: int = 256,
) -> Predictor:  # fmt: skip
    """Load a checkpoint, or an adapter (a folder with adapter_config.json) onto the base it names.

    `dtype` auto is bfloat16 on a GPU that has it, float32 elsewhere.

    Raises:
        PokegemmaError: the model, its processor or its base cannot be loaded, or there is no such device.
    """
    try:
        where = torch.device(device) if device else models.default_device()
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise PokegemmaError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        has_bfloat16 = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    folder = Path(model_path)
    adapter = folder / _ADAPTER_CONFIG
    if not adapter.is_file():
        model = models.load_model(model_path, dtype=dtype, device=where)
        processor = models.load_processor(model_path)
    else:
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
            bare = models.load_model(base, dtype=dtype, device=where)
            # The base model itself, its linear layers wrapped: what follows need not know of the adapter.
            model = peft.PeftModel.from_pretrained(bare, str(folder)).get_base_model().eval()
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise PokegemmaError(f"{folder}: the adapter could not be loaded: {str(error)[:300]}") from error
        processor = models.load_processor(folder if (folder / "processor_config.json").is_file() else base)
    logger.info("%s on %s in %s", model_path, where, dtype)
    collator = Gemma3Collator(processor=processor, layout=layout, dataset_folder=Path(dataset_folder))
    return Predictor(model=model, collator=collator, max_new_tokens=max_new_tokens)
