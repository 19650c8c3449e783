"""Time one decision, from picture to button: stock generate, buttons scored in one pass, a cache, and the loop of play.

    python benchmarks/decision_latency.py

All ways decide the same turns of one session by turns, with one model in one process. On a CPU the model has the
proportions of Gemma-3-4B (see train_throughput.py) in float32, on a GPU its real shape in bfloat16; random weights,
whose language model first learns for a minute to write answers. `--model_path outputs/merged` takes yours. Beside each
time stands what arithmetic leaves possible at the matrix rate and memory bandwidth that this machine shows.
"""

import copy
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decision_cost
from benchmarks.decision_cost import GEMMA_3_4B, Pass, Rates
from benchmarks.made_model import make_model
from benchmarks.play_path import play_recorded
from benchmarks.train_throughput import record_dataset
from pokegemma import cli
from pokegemma.data import prompts
from pokegemma.data.prompts import BUTTONS, LAYOUTS, Layout
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma import families, loading
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.button_scores import checked_scores, place_branches, score_buttons
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.model_image_size import resize_config, resize_processor
from pokegemma.options import option
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.history import PlayView
from pokegemma.provenance import git_commit, package_versions

WHOLE, STOPPED, SCORED = "generate, whole answer", "generate, stopped at the button", "scored, one pass"
CACHED, PREPARED = "session cache", "session cache, prepared"
PLAYED = "scripts/play.py, screen to button"
WAYS = (WHOLE, STOPPED, SCORED, CACHED, PREPARED, PLAYED)

LARGEST_DIFFERENCE = 1e-4
"""Of a probability from a cache to that from the whole prompt, in float32."""

CHECK_EVERY = 20
"""Steps of teaching after which the model is asked for answers."""

DATA_SHEETS = {
    "RTX 4090": Rates(165.2e12, 1008e9),  # NVIDIA Ada GPU architecture: tensor cores, FP32 accumulation, dense
    "A100 80GB SXM": Rates(312e12, 2039e9),  # NVIDIA A100 data sheet, dense
    "H100 SXM": Rates(989.4e12, 3350e9),  # NVIDIA H100 data sheet, dense
    "M1 Max": Rates(10.4e12, 400e9),  # Apple newsroom, October 2021 (no figure for later GPUs)
}
"""What the makers publish, in bfloat16 (Apple: FP32): nothing reaches it."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is decided, by which model, and how often."""

    dataset_path: str | None = option(None, "folder with train.jsonl; default: the toy game")
    model_path: str | None = option(None, "a Gemma 3 checkpoint; default: made and taught")
    layouts: list[str] = option(list(LAYOUTS), "grid frames trajectory")
    num_decisions: int = option(6, "decisions of a session; a trajectory holds all of them")
    repeats: int = option(2, "how often each is decided in each way")
    max_new_tokens: int = option(64, "of a whole answer")
    teach_steps: int = option(200, "most steps that teach the made model to answer")
    json: bool = option(False, "print the result as JSON")


@dataclass
class Setting:
    """One layout at one picture size: the models, and what they did. `seconds`, `buttons`: way -> one a decision."""

    layout: Layout
    size_px: int
    stock: Gemma3ForConditionalGeneration
    stock_processor: Any
    predictor: Predictor
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    prepare_s: list[float] = field(default_factory=list)
    played_prepare_s: list[float] = field(default_factory=list)
    buttons: dict[str, list[str | None]] = field(default_factory=lambda: {way: [] for way in WAYS})
    passes: dict[str, list[list[Pass]]] = field(default_factory=lambda: {way: [] for way in WAYS})
    largest_difference: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.layout}, {self.size_px} px"


def now() -> float:
    """Return the time when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_checkpoints(options: BenchmarkOptions, folder: Path, samples: list[Sample]) -> list[tuple[int, Path]]:
    """Write the model at its own picture size and at half of it; return both sizes with their folders."""
    own, half = folder / "model", folder / "model_half"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    if options.model_path is None:
        made, processor = make_model(folder / "processor", image_scale=1)
        save(made, processor, own)
        del made
    else:
        save(
            open_checkpoint(options.model_path).load_model(dtype=dtype),
            open_checkpoint(options.model_path).processor,
            own,
        )
    size_px = Gemma3Config.from_pretrained(own).vision_config.image_size
    config = resize(Gemma3Config.from_pretrained(own), size_px // 2)
    smaller = open_checkpoint(own, image_size=size_px // 2).load_model(dtype=dtype, device=loading.default_device())
    processor = open_checkpoint(own).processor
    resize_processor(processor, config)
    if options.model_path is None:
        teach(smaller, processor, samples, Path(options.dataset_path), num_steps=options.teach_steps)
        larger = open_checkpoint(own).load_model(dtype=dtype)
        larger.model.language_model.load_state_dict(smaller.model.language_model.state_dict())
        save(larger, open_checkpoint(own).processor, own)
    save(smaller, processor, half)
    return [(size_px, own), (size_px // 2, half)]


def resize(config: Gemma3Config, size_px: int) -> Gemma3Config:
    """Return a config for another picture size."""
    config = copy.deepcopy(config)
    resize_config(config, size_px)
    return config


def save(model: Any, processor: Any, folder: Path) -> None:
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def teach(model: Any, processor: Any, samples: list[Sample], dataset: Path, *, num_steps: int) -> None:
    """Train the language model on recorded answers until it writes some, for `num_steps` at most.

    Short trajectories: the fewest tokens an answer.

    Raises:
        CheckFailedError: it still writes none.
    """
    learned = list(model.model.language_model.parameters())
    model.requires_grad_(False)
    for weight in learned:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=1e-4 if torch.cuda.is_available() else 1e-3)
    collator = Gemma3Collator(processor=processor, layout="trajectory", dataset_folder=dataset)
    stretches = list(cut_trajectories(samples, max_decisions=3, overlap=0))
    chosen = np.random.default_rng(0).permutation(len(stretches))
    with tqdm(range(1, num_steps + 1), desc="teach answers", unit="step") as progress:
        for step in progress:
            batch = collator([stretches[chosen[step % len(chosen)]]])
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.2f}")
            if step % CHECK_EVERY == 0 and can_answer(model, collator, samples[:2]):
                break
        else:
            raise CheckFailedError(f"--teach_steps {num_steps}: the model writes no answers yet (loss {loss:.2f})")
    model.requires_grad_(False)


def can_answer(model: Any, collator: Gemma3Collator, samples: list[Sample]) -> bool:
    """Return whether a model writes whole answers to samples as grid and as frames."""
    predictors = [Predictor(model, replace(collator, layout=layout)) for layout in ("grid", "frames")]
    return all(answer.button for predictor in predictors for answer in predictor.generate(samples))


def load_settings(options: BenchmarkOptions, checkpoints: list[tuple[int, Path]]) -> Iterator[Setting]:
    """Yield every layout at every size; models are loaded once a size."""
    device = loading.default_device()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    for size_px, folder in checkpoints:
        stock = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        ours = open_checkpoint(folder).load_model(dtype=dtype, device=device)
        for layout in options.layouts:
            collator = Gemma3Collator(
                processor=open_checkpoint(folder).processor, layout=layout, dataset_folder=Path(options.dataset_path)
            )
            yield Setting(layout, size_px, stock, AutoProcessor.from_pretrained(folder), Predictor(ours, collator))


def example_of(setting: Setting, session: Sequence[Sample], number: int) -> Sample | Trajectory:
    return Trajectory(tuple(session[: number + 1])) if setting.layout == "trajectory" else session[number]


def generate_plainly(
    setting: Setting, example: Sample | Trajectory, *, max_new_tokens: int
) -> tuple[str, int, int, int]:
    """Return (text, prompt tokens, tokens written, pictures) as stock transformers answers the open question."""
    if isinstance(example, Trajectory):
        messages, paths = prompts.build_trajectory_messages(example), prompts.trajectory_images(example)
    else:
        messages, paths = (
            prompts.build_messages(example, setting.layout),
            prompts.sample_images(example, setting.layout),
        )
    processor, folder = setting.stock_processor, setting.predictor.collator.dataset_folder
    text = processor.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    images = [Image.open(folder / path).convert("RGB") for path in paths]
    inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False).to(setting.stock.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(setting.stock.dtype)
    with torch.inference_mode():
        written = setting.stock.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=families.stop_tokens(processor.tokenizer),
        )[0, inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True), inputs["input_ids"].shape[1], len(written), len(images)


def read_button(text: str) -> str | None:
    """Return the button that an answer begins with, whole or cut off behind it; None where it is no answer."""
    name = text.removeprefix(prompts.ANSWER_PREFIX)
    found = [button for button in BUTTONS if name != text and name.split('"')[0] == button]
    return found[0] if found else None


def prompt_batch(collator: Gemma3Collator, example: Sample | Trajectory) -> dict[str, torch.Tensor]:
    """Return the whole prompt of the last decision of an example as a batch of one row."""
    row = collator.tokenize(example)
    ids = torch.tensor([row.ids[: row.answer_starts[-1]]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": collator.token_types(ids),
        **collator.read_paths(collator.picture_paths(example)),
    }


def score_whole(setting: Setting, example: Sample | Trajectory) -> tuple[np.ndarray, int, int]:
    """Return (probabilities, prompt tokens, pictures) from one pass over the whole prompt."""
    collator, model = setting.predictor.collator, setting.predictor.model
    batch = {name: value.to(model.device) for name, value in prompt_batch(collator, example).items()}
    scores = score_buttons(model, batch, collator.button_tokens)
    return checked_scores(scores)[0], batch["input_ids"].shape[1], len(batch["pixel_values"])


class Meter:
    """Time each way on each decision of a session, and keep what arithmetic needs."""

    def __init__(self, options: BenchmarkOptions, setting: Setting) -> None:
        self.options, self.setting = options, setting
        self.config = setting.predictor.model.config
        size = setting.predictor.model.dtype.itemsize
        self.sizes = {"bytes_per_weight": size, "bytes_per_value": size}
        tokens = setting.predictor.collator.button_tokens
        self.num_button = len(tokens.prefix) + max(map(len, tokens.branches))
        self.tree = len(place_branches(tokens)[0])

    def run(self, session: Sequence[Sample], *, record: bool) -> None:
        """Decide a session once in every way, decision by decision; `record` keeps the times."""
        goal, longest = session[0].metadata["goal"], len(session) + 2
        view = PlayView(self.setting.predictor.collator.layout, max_decisions=longest)
        players = {way: CachedPlayer(self.setting.predictor, view) for way in (CACHED, PREPARED)}
        for player in players.values():
            player.start(goal)
        whole_scores = []
        for number, sample in enumerate(session):
            example = example_of(self.setting, session, number)
            whole = self._generate(WHOLE, example, self.options.max_new_tokens, record=record)
            self._generate(STOPPED, example, self.num_button, record=record)
            began = now()
            scores, num_tokens, num_pictures = score_whole(self.setting, example)
            passes = [self._picture(num_pictures), self._text(num_tokens)]
            self._note(SCORED, now() - began, BUTTONS[int(scores.argmax())], passes, record=record)
            for way, player in players.items():
                self._decide(way, player, sample, scores, record=record)
            whole_scores.append(scores)
            if record and whole is None:
                tqdm.write(f"{self.setting.name}: no answer to {sample.id}", file=sys.stderr)
        self._play(session, view, whole_scores, record=record)

    def _play(self, session: Sequence[Sample], view: PlayView, scores: Sequence[np.ndarray], *, record: bool) -> None:
        """Decide the session once more, in the loop of scripts/play.py."""
        predictor = self.setting.predictor
        player = CachedPlayer(predictor, view)
        played = play_recorded(player, session, predictor.collator.dataset_folder)
        for decision, expected in zip(played, scores, strict=True):
            passes = [self._text(decision.num_new, num_cached=decision.num_cached)]
            if decision.num_pictures:
                passes.insert(0, self._picture(decision.num_pictures))
            self._note(PLAYED, decision.seconds, decision.button, passes, record=record)
            self._note_difference(decision.probabilities, expected)
            if record:
                self.setting.played_prepare_s.append(decision.prepare_s)

    def _generate(self, way: str, example: Sample | Trajectory, limit: int, *, record: bool) -> str | None:
        began = now()
        text, num_prompt, num_written, num_pictures = generate_plainly(self.setting, example, max_new_tokens=limit)
        passes = decision_cost.generation_passes(self.config, num_prompt, num_written, **self.sizes)
        self._note(way, now() - began, read_button(text), [self._picture(num_pictures), *passes], record=record)
        return read_button(text)

    def _decide(self, way: str, player: CachedPlayer, sample: Sample, scores: np.ndarray, *, record: bool) -> None:
        cache = player.cache
        if way == PREPARED:
            began = now()
            player.prepare()
            if record:
                self.setting.prepare_s.append(now() - began)
        pictures, computed = cache.num_encoded, cache.num_computed
        began = now()
        decision = player.decide(self.setting.predictor.collator.dataset_folder / sample.frames[-1])
        seconds = now() - began
        new = cache.num_computed - computed
        passes = [self._text(new, num_cached=cache.num_tokens - new)]
        if cache.num_encoded > pictures:
            passes.insert(0, self._picture(cache.num_encoded - pictures))
        self._note(way, seconds, decision.button, passes, record=record)
        self._note_difference(decision.probabilities, scores)
        player.pressed(*sample.metadata["buttons"], answer=sample.output)

    def _note_difference(self, probabilities: np.ndarray, expected: np.ndarray) -> None:
        difference = float(np.abs(probabilities - expected).max())
        self.setting.largest_difference = max(self.setting.largest_difference, difference)

    def _picture(self, number: int) -> Pass:
        return decision_cost.picture_pass(
            self.config, num_pictures=number, bytes_per_weight=self.sizes["bytes_per_weight"]
        )

    def _text(self, num_tokens: int, *, num_cached: int = 0) -> Pass:
        logits = self.tree - self.num_button + 2
        return decision_cost.text_pass(
            self.config, num_tokens + self.tree, num_cached=num_cached, num_logits=logits, **self.sizes
        )

    def _note(self, way: str, seconds: float, button: str | None, passes: list[Pass], *, record: bool) -> None:
        if record:
            self.setting.seconds[way].append(seconds)
            self.setting.buttons[way].append(button)
            self.setting.passes[way].append(passes)


def measured_rates(dtype: torch.dtype) -> Rates:
    """Return this machine's rates: the fastest of several large matrix products, and of several copies."""
    device, side = loading.default_device(), 8192 if torch.cuda.is_available() else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(2**30 if torch.cuda.is_available() else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(2 * side**3 / fastest(lambda: a @ b), 2 * source.numel() / fastest(lambda: target.copy_(source)))


def fastest(work: Callable[[], object], *, repeats: int = 10) -> float:
    """Return the seconds of the fastest of several runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = now()
        work()
        seconds.append(now() - began)
    return min(seconds)


def check_buttons(settings: Sequence[Setting], *, exact: bool) -> list[str]:
    """Return where a way's button is not that of the whole generated answer, a line each.

    Raises:
        CheckFailedError: in float32, or a probability from a cache differs, or there was no answer to compare with.
    """
    problems = []
    for setting in settings:
        for way in WAYS[1:]:
            pairs = zip(setting.buttons[WHOLE], setting.buttons[way], strict=True)
            problems += [
                f"{setting.name}, {way}: decision {number}: {button}, generated {plain}"
                for number, (plain, button) in enumerate(pairs)
                if plain is not None and plain != button
            ]
        if not any(setting.buttons[WHOLE]):
            raise CheckFailedError(f"{setting.name}: no generated text was an answer; nothing to compare with")
        if exact:
            check_difference(setting)
    if exact and problems:
        raise CheckFailedError("; ".join(problems))
    return problems


def check_difference(setting: Setting) -> None:
    """Check the probabilities from a cache, in float32.

    Raises:
        CheckFailedError: one differs from that of the whole prompt.
    """
    if setting.largest_difference > LARGEST_DIFFERENCE:
        raise CheckFailedError(f"{setting.name}: a probability from the cache differs by {setting.largest_difference}")


def summarise(setting: Setting, rates: Rates, *, compared_with: str = WHOLE) -> list[dict[str, Any]]:
    """Return a row for each way: median and range in ms, ratio, agreement, floor, and what the passes hold.

    Args:
        compared_with: the way whose buttons all are compared with; a model that was not taught writes none.
    """
    rows = []
    between = {PREPARED: setting.prepare_s, PLAYED: setting.played_prepare_s}
    for way in WAYS:
        seconds = setting.seconds[way]
        pairs = zip(setting.buttons[compared_with], setting.buttons[way], strict=True)
        compared = [plain == button for plain, button in pairs if plain is not None]
        floors = [rates.floor_s(passes) for passes in setting.passes[way]]
        rows.append(
            {
                "layout": setting.layout,
                "size_px": setting.size_px,
                "way": way,
                "median_ms": 1e3 * statistics.median(seconds),
                "fastest_ms": 1e3 * min(seconds),
                "slowest_ms": 1e3 * max(seconds),
                "ratio": statistics.median(setting.seconds[WHOLE]) / statistics.median(seconds),
                "same_button": sum(compared),
                "compared": len(compared),
                "floor_ms": 1e3 * statistics.median(floors),
                "gigaflop": statistics.median(sum(one.flop for one in passes) / 1e9 for passes in setting.passes[way]),
                "between_ms": 1e3 * statistics.median(between[way]) if way in between else None,
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | ms a decision | ratio | same button | gigaFLOP | floor, ms | prepared before, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before = "" if row["between_ms"] is None else format_ms(row["between_ms"])
        lines.append(
            f"| {row['layout']}, {row['size_px']} px: {row['way']} | {format_ms(row['median_ms'])} "
            f"({format_ms(row['fastest_ms'])}-{format_ms(row['slowest_ms'])}) | {row['ratio']:.1f} | "
            f"{row['same_button']} of {row['compared']} | {row['gigaflop']:.0f} | {format_ms(row['floor_ms'])} | "
            f"{before} |"
        )
    return "\n".join(lines)


def format_ms(milliseconds: float) -> str:
    """Return a time with one decimal below 10 ms."""
    return f"{milliseconds:.{int(milliseconds < 10)}f}"


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of our own English prompts and answers.

    A word counts one token per four letters begun, a digit or mark one. For all texts of our recorded sessions it is an
    upper estimate: 114 tokens for a context of 89 (benchmarks/real_gemma.md). It is no bound for any text.
    """
    pieces = re.findall(r"[A-Za-z]+|\d|\s|[^\w\s]|.", re.sub(r" (?=\S)", "", text), re.DOTALL)
    return sum(-(-len(piece) // 4) if piece.isascii() else len(piece.encode()) for piece in pieces)


def floors_of_4b(session: Sequence[Sample], machine: dict[str, Rates]) -> list[dict[str, Any]]:
    """Return the floors of Gemma-3-4B for the last decision of a session, in ms by machine.

    A conversation asks shortly, and tells earlier answers. Tokens of the text estimated: its tokenizer is not needed.
    """
    sample, count = session[len(session) // 2], estimate_tokens
    before, after, answer = count(sample.context) + 6, count(sample.question) + 8, count(sample.output) + 2
    button, next_turn = count(prompts.ANSWER_PREFIX) + 1, count(prompts.NEXT_QUESTION) + 8
    rows = []
    for size_px in (896, 448, 224):
        config = resize(GEMMA_3_4B, size_px)
        picture = config.mm_tokens_per_image + 4
        last = picture + next_turn
        told = before + (last + answer) * (len(session) - 1)
        for name, pictures, new, cached, written, bits in (
            ("grid: generate", 1, before + picture + after, 0, answer, 16),
            ("frames: generate", 4, before + 4 * picture + after, 0, answer, 16),
            ("grid: session cache", 1, picture + after + button, before, 1, 16),
            ("frames: session cache, prepared", 1, picture + after + button, before + 3 * picture, 1, 16),
            ("trajectory: generate", len(session), told + last, 0, answer, 16),
            ("trajectory: session cache, prepared", 1, last + button, told, 1, 16),
            ("trajectory: session cache, prepared, 4-bit text weights", 1, last + button, told, 1, 4.5),
        ):
            passes = [
                decision_cost.picture_pass(config, num_pictures=pictures),
                *decision_cost.generation_passes(config, new, written, bytes_per_weight=bits / 8, num_cached=cached),
            ]
            floors = {name: 1e3 * rates.floor_s(passes) for name, rates in machine.items()}
            rows.append({"way": f"{size_px} px, {name}", "floors_ms": floors})
    return rows


def format_floors(rows: Sequence[dict[str, Any]]) -> str:
    machines = list(rows[0]["floors_ms"])
    lines = [f"| Gemma-3-4B, floor in ms | {' | '.join(machines)} |", "|---" * (len(machines) + 1) + "|"]
    lines += [f"| {row['way']} | {' | '.join(f'{ms:.3g}' for ms in row['floors_ms'].values())} |" for row in rows]
    return "\n".join(lines)


def choose_session(options: BenchmarkOptions) -> tuple[list[Sample], list[Sample]]:
    """Return all samples, and the first turns of the first session that has enough without an interruption.

    Raises:
        PokegemmaError: none has.
    """
    samples = list(read_samples(Path(options.dataset_path) / "train.jsonl"))
    for _, group in groupby(samples, key=lambda sample: sample.session):
        session = list(group)[: options.num_decisions]
        if len(session) == options.num_decisions and is_whole(session):
            return samples, session
    raise PokegemmaError(
        f"--num_decisions {options.num_decisions}: no session of {options.dataset_path} begins with so many turns that "
        "are samples"
    )


def is_whole(session: Sequence[Sample]) -> bool:
    """Return whether samples show and tell no other turns than these: what a `CachedPlayer` that saw these would."""
    frames = [sample.frames[-1] for sample in session]
    pressed: list[str] = []
    for number, sample in enumerate(session):
        window = frames[max(0, number + 1 - len(sample.frames)) : number + 1]
        filled = [window[0]] * (len(sample.frames) - len(window)) + window
        if list(sample.frames) != filled or sample.previous_buttons != pressed[-prompts.MAX_PREVIOUS_BUTTONS :]:
            return False
        pressed += sample.metadata["buttons"]
    return True


def main() -> None:
    (options,) = cli.parse_options(BenchmarkOptions, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="pokegemma_benchmark_") as temporary:
        folder = Path(temporary)
        if options.dataset_path is None:
            options = replace(options, dataset_path=str(record_dataset(folder)))
        samples, session = choose_session(options)
        settings = list(load_settings(options, make_checkpoints(options, folder, samples)))
        meters = [Meter(options, setting) for setting in settings]
        for meter in meters:  # warm up
            meter.run(session[:1], record=False)
        with tqdm(total=len(meters) * options.repeats, desc="sessions") as progress:
            for _ in range(options.repeats):
                for meter in meters:
                    meter.run(session, record=True)
                    progress.update()
    dtype = settings[0].stock.dtype
    here = measured_rates(dtype)
    rows = [row for setting in settings for row in summarise(setting, here)]
    print(format_table(rows), file=sys.stderr)  # not lost if the buttons differ
    differing = check_buttons(settings, exact=dtype == torch.float32)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
    floors = floors_of_4b(session, {f"{name}, measured": measured_rates(torch.bfloat16), **DATA_SHEETS})
    record = {
        "rows": rows,
        "rates": asdict(here),
        "floors_of_gemma_3_4b": floors,
        "differing_buttons": differing,
        "largest_difference": max(setting.largest_difference for setting in settings),
        "buttons": settings[0].buttons[WHOLE],
        "dtype": str(dtype),
        "commit": git_commit(),
        "versions": package_versions(),
        "options": asdict(options),
        "load_average": os.getloadavg(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(format_table(rows))
    print(
        f"\nlargest difference of a probability from a cache to the whole prompt's: {record['largest_difference']:.1e}"
    )
    print(*(f"differs: {line}" for line in differing), sep="\n")
    print(f"measured in {dtype}: {here.flop_per_s / 1e9:.0f} gigaFLOP/s, {here.bytes_per_s / 1e9:.1f} GB/s\n")
    print(format_floors(floors))
    print(f"\n{record['machine']}, load average {record['load_average'][0]:.1f}, commit {record['commit']}")


if __name__ == "__main__":
    cli.run(main)
