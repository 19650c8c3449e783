"""Time training steps of stock TRL and ours on the same samples, in one run, and compare their losses step by step.

    python benchmarks/train_throughput.py

Each row is a process of its own, so that its peak memory is its own; the rows take turns. On a CPU the model has the
proportions of Gemma-3-4B (a quarter of its width, and a tower that costs as much of the language model's work for a
picture); on a GPU it has the real shape in bfloat16. Weights are random: they cost the same time as trained ones.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.made_model import SHAPES, make_model
from pokegemma import cli
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.prompts import build_messages, sample_images
from pokegemma.data.samples import read_samples
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.options import option
from pokegemma.play.toy.recorder import record_sessions
from pokegemma.provenance import git_commit, package_versions

LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 5e-2}
"""Largest difference of a step's loss to stock TRL's: float32 on a CPU, bfloat16 on a GPU."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is trained on, and how often each row is timed."""

    dataset_path: str | None = option(None, "folder with train.jsonl; default: the toy game")
    samples_per_step: int = option(4, "samples of a forward pass (and of an optimizer step)")
    max_decisions: int = option(16, "decisions of a trajectory, which is a step")
    num_steps: int = option(3, "steps that are timed, after one that is not")
    repeats: int = option(2, "how often each row is run")
    rows: str | None = option(None, "only rows whose name holds this, and the stock rows they need")
    shape: str | None = option(None, "of the model; default: 4b on a GPU, else quarter", choices=list(SHAPES))
    row: str | None = option(None, "internal: run one row (JSON) and print what it measured")
    json: bool = option(False, "print the result as JSON")


@dataclass(frozen=True)
class Row:
    """One way to train. `checkpointing` is TRL's default, gradient checkpointing."""

    name: str
    stock: bool = False
    layout: str = "frames"
    cached: bool = False
    checkpointing: bool = True
    samples_per_row: int = 1
    image_scale: int = 1


ROWS = (
    Row("stock TRL, four images", stock=True),
    Row("stock TRL, four images, no checkpointing", stock=True, checkpointing=False),
    Row("stock TRL, grid", stock=True, layout="grid"),
    Row("stock TRL, four images, half the image size", stock=True, image_scale=2),
    Row("frames"),
    Row("frames, cached"),
    Row("frames, cached, no checkpointing", cached=True, checkpointing=False),
    Row("frames, cached, 4 a row", cached=True, samples_per_row=4),
    Row("frames, cached, 4 a row, no checkpointing", cached=True, samples_per_row=4, checkpointing=False),
    Row("grid", layout="grid"),
    Row("grid, cached, no checkpointing", layout="grid", cached=True, checkpointing=False),
    Row("grid, cached, 4 a row, no checkpointing", layout="grid", cached=True, samples_per_row=4, checkpointing=False),
    Row("trajectory", layout="trajectory"),
    Row("trajectory, cached", layout="trajectory", cached=True),
    Row("trajectory, cached, no checkpointing", layout="trajectory", cached=True, checkpointing=False),
    Row("frames, half the image size", image_scale=2),
    Row("frames, half the image size, cached, no checkpointing", image_scale=2, cached=True, checkpointing=False),
    Row(
        "trajectory, half the image size, cached, no checkpointing",
        layout="trajectory",
        image_scale=2,
        cached=True,
        checkpointing=False,
    ),
)
ROWS = tuple(replace(row, cached=row.cached or "cached" in row.name) for row in ROWS)


def make_row_model(image_scale: int, options: BenchmarkOptions) -> tuple[Any, Any]:
    """Return (model, processor) of a row, whose processor is kept next to the dataset."""
    folder = Path(options.dataset_path).parent / f"processor_{image_scale}"
    return make_model(folder, image_scale=image_scale, shape=options.shape)


class PeakMemory:
    """The highest memory since `start`, above what was in use then: the step's own, not the weights'."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
            self.before = self._status("VmRSS")

    def peak_mib(self) -> float:
        import torch

        high = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        return (high - self.before) / 2**20

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def draw(examples: Iterable[Any], *, number: int) -> list[Any]:
    """Return samples or trajectories as a training run meets them: from all sessions; the same for all rows."""
    return random.Random(0).sample(list(examples), number)


def stock_trainer(row: Row, model: Any, processor: Any, options: BenchmarkOptions, arguments: dict[str, Any]) -> Any:
    """Return TRL's SFTTrainer with its own collator; pictures are opened as it asks for them."""
    from datasets import Dataset, Image, Sequence
    from trl import SFTConfig, SFTTrainer

    from pokegemma.gemma.families import FAMILIES
    from pokegemma.training.lora_targets import lora_config
    from pokegemma.training.options import ModelOptions

    folder = Path(options.dataset_path)
    rows = []
    for sample in draw(read_samples(folder / "train.jsonl"), number=(options.num_steps + 1) * options.samples_per_step):
        user, answer = build_messages(sample, row.layout)
        images = [str(folder / path) for path in sample_images(sample, row.layout)]
        rows.append({"prompt": [user], "completion": [answer], "images": images})
    dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    # What TRL cannot do without: its default max_length of 1024 would cut the pictures.
    config = SFTConfig(**arguments, max_length=None)
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=lora_config(ModelOptions(finetuning="lora", lora_dropout=0.0), FAMILIES["gemma3"]),
    )


def our_trainer(row: Row, model: Any, processor: Any, options: BenchmarkOptions, arguments: dict[str, Any]) -> Any:
    """Return our trainer on the same samples in the same order."""
    from datasets import Dataset

    from pokegemma.gemma.families import FAMILIES
    from pokegemma.gemma.vision_tower import accept_compact_batches
    from pokegemma.training.lora_targets import lora_config
    from pokegemma.training.options import ModelOptions, TrainingOptions
    from pokegemma.training.trainer import PokemonTrainer

    accept_compact_batches(model)
    examples, collator = our_examples(row, processor, options)
    if row.layout == "trajectory":
        arguments["per_device_train_batch_size"] = 1
        rows = [
            {"samples": [sample.to_json() for sample in one.samples], "num_context": one.num_context}
            for one in examples
        ]
    else:
        rows = [{"sample": one.to_json()} for one in examples]
    if row.cached:
        collator.features = open_features(row, model, collator, examples, options)
    return PokemonTrainer(
        model=model,
        args=TrainingOptions(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=processor,
        peft_config=lora_config(ModelOptions(finetuning="lora", lora_dropout=0.0), FAMILIES["gemma3"]),
    )


def our_examples(row: Row, processor: Any, options: BenchmarkOptions) -> tuple[list[Any], Any]:
    """Return the samples or trajectories of all steps, and the collator that shows them."""
    from pokegemma.gemma.batches.collator import Gemma3Collator
    from pokegemma.training.inputs import read_examples
    from pokegemma.training.options import DataOptions

    path = Path(options.dataset_path) / "train.jsonl"
    data = DataOptions(dataset_path=str(path), layout=row.layout, max_decisions=options.max_decisions)
    number = (options.num_steps + 1) * (1 if row.layout == "trajectory" else options.samples_per_step)
    collator = Gemma3Collator(
        processor=processor, layout=row.layout, dataset_folder=Path(), samples_per_row=row.samples_per_row
    )
    return draw(read_examples(path, data), number=number), collator


def open_features(row: Row, model: Any, collator: Any, examples: list[Any], options: BenchmarkOptions) -> Any:
    """Return the feature cache of a row's pictures."""
    import torch

    from pokegemma.gemma.batches.feature_encoder import prepare_cache

    paths = (picture for one in examples for picture in collator.picture_paths(one))
    folder = Path(options.dataset_path).parent / f"features_{row.image_scale}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return prepare_cache(folder, model, collator.processor, paths, device=device)


def time_features(row: Row, options: BenchmarkOptions) -> tuple[int, float]:
    """Fill the cache for a row; return how many frames that took, and how many seconds with hashing and reading."""
    model, processor = make_row_model(row.image_scale, options)
    examples, collator = our_examples(row, processor, options)
    chunks = Path(options.dataset_path).parent / f"features_{row.image_scale}" / "chunks"
    before, began = set(chunks.glob("*")), time.perf_counter()
    cache = open_features(row, model, collator, examples, options)
    return (len(set(cache.digests.values())) if set(chunks.glob("*")) - before else 0), time.perf_counter() - began


class Meter:
    """Measure a trainer's steps: when they end, decisions, tokens, calls of the tower, peak memory, FLOPs."""

    def __init__(self, trainer: Any, *, audited_step: int | None) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self.ends: list[float] = []
        self.decisions: list[int] = []
        self.tokens: list[int] = []
        self.tower_calls, self.pictures, self.peak_mib = 0, 0, 0.0
        self.flops = FlopCounterMode(display=False)
        self._training_step = trainer.training_step
        trainer.training_step = self._count_and_train
        tower = next(module for name, module in trainer.model.named_modules() if name.endswith("vision_tower"))
        tower.register_forward_pre_hook(self._see_tower, with_kwargs=True)
        trainer.add_callback(self._clock(audited_step))
        self.memory = PeakMemory()

    def _count_and_train(self, inner: Any, inputs: dict[str, Any], *rest: Any, **others: Any) -> Any:
        import torch

        starts = torch.nn.functional.pad((inputs["labels"] != -100).long(), (1, 0)).diff(dim=1)
        self.decisions.append(int((starts == 1).sum()))
        self.tokens.append(int(inputs["attention_mask"].sum()))
        return self._training_step(inner, inputs, *rest, **others)

    def _see_tower(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tower_calls += 1
        self.pictures += len(kwargs["pixel_values"])

    def _clock(self, audited_step: int | None) -> Any:
        """Return a callback that counts the FLOPs of one step, the first being 1."""
        import torch
        from transformers import TrainerCallback

        meter = self

        class Clock(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == audited_step:
                    meter.flops.__enter__()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if state.global_step == 1:
                    meter.peak_mib = meter.memory.peak_mib()
                if state.global_step == audited_step:
                    meter.flops.__exit__(None, None, None)
                meter.ends.append(time.perf_counter())

        return Clock()


def training_arguments(row: Row, options: BenchmarkOptions, *, num_steps: int) -> dict[str, Any]:
    """Return the arguments that stock TRL and ours share, and ours in addition."""
    import torch

    on_gpu = torch.cuda.is_available()
    arguments = {
        "output_dir": str(Path(options.dataset_path).parent / "out"),
        "max_steps": num_steps,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": options.samples_per_step,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": row.checkpointing,
    }
    return arguments if row.stock else {**arguments, "eval_strategy": "no", "dataloader_num_workers": 2 * on_gpu}


def run_row(row: Row, options: BenchmarkOptions, *, timed: bool, audit: bool) -> dict[str, Any]:
    """Train a few steps and return losses, seconds a step, decisions and tokens a step, tower calls, peak memory.

    Args:
        timed: `options.num_steps` steps follow the first one, which shows the memory.
        audit: one more step, slowed down by counting, shows the FLOPs.
    """
    import torch
    from torch.utils.data import SequentialSampler

    num_timed = options.num_steps if timed else 0
    model, processor = make_row_model(row.image_scale, options)
    arguments = training_arguments(row, options, num_steps=1 + num_timed + audit)
    build = stock_trainer if row.stock else our_trainer
    trainer = build(row, model, processor, options, arguments)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)  # the same order for all
    meter = Meter(trainer, audited_step=1 + num_timed + audit if audit else None)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    waits = [entry["data_wait_share"] for entry in history[1:] if "data_wait_share" in entry]
    return {
        "losses": losses,
        "step_s": [b - a for a, b in pairwise(meter.ends)][:num_timed],
        "decisions": meter.decisions[1:][:num_timed],
        "tokens": meter.tokens[1:][:num_timed],
        "tower_calls": meter.tower_calls / len(losses),
        "pictures": meter.pictures / sum(meter.decisions),
        "teraflop": meter.flops.get_total_flops() / 1e12 / meter.decisions[-1] if audit else None,
        "peak_mib": meter.peak_mib,
        "data_wait": statistics.mean(waits) if waits else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "on_gpu": torch.cuda.is_available(),
    }


def stock_batch(model: Any, processor: Any, conversations: Sequence[tuple[Sequence[Any], Sequence[Path]]]) -> Any:
    """Return the batch that TRL's collator makes of (messages, pictures), with loss on the last answers."""
    from PIL import Image
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, completion_only_loss=True)
    examples = [
        {
            "prompt": messages[:-1],
            "completion": messages[-1:],
            "images": [Image.open(path).convert("RGB") for path in paths],
        }
        for messages, paths in conversations
    ]
    batch = {name: tensor.to(model.device) for name, tensor in collator(examples).items()}
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def stock_loss_of_trajectory(options: BenchmarkOptions, *, image_scale: int) -> float:
    """Return the loss of the first trajectory by stock parts: a row for each decision, with all that came before it."""
    import torch

    from pokegemma.data.prompts import build_trajectory_messages, trajectory_images
    from pokegemma.data.trajectories import Trajectory, cut_trajectories
    from pokegemma.training.options import DataOptions

    folder = Path(options.dataset_path)
    model, processor = make_row_model(image_scale, options)
    samples = read_samples(folder / "train.jsonl")
    cut = cut_trajectories(samples, max_decisions=options.max_decisions, overlap=DataOptions("").overlap_decisions)
    trajectory = draw(cut, number=options.num_steps + 1)[0]
    total, number = 0.0, 0
    for end in range(trajectory.num_context + 1, len(trajectory.samples) + 1):
        part = Trajectory(trajectory.samples[:end], trajectory.num_context)
        paths = [folder / path for path in trajectory_images(part)]
        batch = stock_batch(model, processor, [(build_trajectory_messages(part), paths)])
        num_tokens = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * num_tokens
        number += num_tokens
    return total / number


def proportions() -> dict[str, float]:
    """Return the tower's FLOPs for a picture in units of the language model's for a token: the 4B's, and this one's.

    Forward, linear layers and attention within a picture; without attention between tokens and the LM head.
    """
    result = {}
    for name, shape in (("Gemma-3-4B", SHAPES["4b"]), ("this model", SHAPES["quarter"])):
        text, vision = shape.text, shape.vision
        width, heads = text["hidden_size"], text["head_dim"]
        attention = 2 * width * heads * (text["num_attention_heads"] + text["num_key_value_heads"])
        token = 2 * text["num_hidden_layers"] * (attention + 3 * width * text["intermediate_size"])
        patches, inner = (shape.image_size_px // 14) ** 2, vision["hidden_size"]
        layer = 4 * inner**2 + 2 * inner * vision["intermediate_size"]
        picture = vision["num_hidden_layers"] * (2 * patches * layer + 4 * patches**2 * inner)
        result[name] = picture / token
    return result


def matrix_rate() -> float | None:
    """Return the chip's teraFLOP a second at a large bfloat16 matrix product; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc: give memory back when it is freed, so that a process holds what it uses. Slower: not for timing."""


def call(options: BenchmarkOptions, task: Any, *, environment: dict[str, str] | None = None) -> Any:
    """Run one task in a process of its own and return what it measured."""
    given = {**asdict(options), "row": json.dumps(task), "json": True, "rows": None}
    arguments = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PokegemmaError(f"{task}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_task(options: BenchmarkOptions) -> Any:
    """Do what `call` asked for."""
    task = json.loads(options.row)
    if "features of" in task:
        return time_features(Row(**task["features of"]), options)
    if "trajectory loss" in task:
        return stock_loss_of_trajectory(options, image_scale=task["trajectory loss"])
    if task == "matrix rate":
        return matrix_rate()
    return run_row(Row(**task["row"]), options, timed=not task["audit"], audit=task["audit"])


def record_dataset(folder: Path, *, num_sessions: int = 12, num_turns: int = 32) -> Path:
    """Record and convert sessions of the toy game: four frames a sample, the longest of a session its trajectory."""
    record_sessions(folder / "recorded", num_sessions=num_sessions, seed=0, num_turns=num_turns)
    convert_corpus(
        folder / "recorded" / "runs", folder / "dataset", window=WindowOptions(), eval_fraction=0.1, num_workers=2
    )
    return folder / "dataset"


def summarise_row(row: Row, runs: list[dict[str, Any]], audit: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a row, from the runs that timed it and the one that audited it."""
    seconds = [step for run in runs for step in run["step_s"]]
    per_step = [number for run in runs for number in run["decisions"]]
    rates = sorted(number / step for number, step in zip(per_step, seconds, strict=True))
    first = runs[0]
    return {
        "name": row.name,
        "row": asdict(row),
        "losses": first["losses"],
        "decisions_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "peak_mib": audit["peak_mib"],
        "teraflop": audit["teraflop"],
        "tokens_a_decision": sum(first["tokens"]) / sum(first["decisions"]),
        **{name: first[name] for name in ("tower_calls", "pictures", "data_wait", "device", "on_gpu")},
    }


def measure(options: BenchmarkOptions) -> list[dict[str, Any]]:
    """Run all rows by turns and return what each measured, with its ratio to the first."""
    wanted = [row for row in ROWS if options.rows is None or options.rows in row.name]
    needed = {(row.layout, row.image_scale) for row in wanted} | {(ROWS[0].layout, ROWS[0].image_scale)}
    stock = [row for row in ROWS if row.stock and row.checkpointing and (row.layout, row.image_scale) in needed]
    chosen = [row for row in ROWS if row in wanted or row in stock]
    with tqdm(total=len(chosen) * (options.repeats + 2), desc="rows") as progress:
        encoding = {}  # before any row, in processes of their own, so that no row pays for it
        for row in chosen:
            if row.cached:
                encoding[row.name] = call(options, {"features of": asdict(row)})
            progress.update()
        runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in chosen}
        for _ in range(options.repeats):
            for row in chosen:
                runs[row.name].append(call(options, {"row": asdict(row), "audit": False}))
                progress.update()
        audits = {}
        for row in chosen:
            audits[row.name] = call(options, {"row": asdict(row), "audit": True}, environment=EXACT_MEMORY)
            progress.update()
    results = [
        {**summarise_row(row, runs[row.name], audits[row.name]), "features": encoding.get(row.name)} for row in chosen
    ]
    for result in results:
        result["ratio"] = result["decisions_per_second"] / results[0]["decisions_per_second"]
    return results


def check_losses(results: list[dict[str, Any]], trajectory_loss: Callable[[int], float]) -> float:
    """Return the largest difference of a step's loss to stock TRL's on what a row shows.

    Each step of grid and frames against the stock row of the same layout and size; the first step of a trajectory
    against its decisions, each written out as a row.

    Args:
        trajectory_loss: called with an image scale; returns what `stock_loss_of_trajectory` does.

    Raises:
        CheckFailedError: it is too large: then the rows do not learn the same.
    """
    tolerance = LOSS_TOLERANCE["cuda" if results[0]["on_gpu"] else "cpu"]
    stock: dict[tuple[str, int], list[float]] = {}
    for result in results:
        row = Row(**result["row"])
        if row.stock and row.checkpointing:
            stock[row.layout, row.image_scale] = result["losses"]
    worst = 0.0
    for result in results:
        row = Row(**result["row"])
        shown = row.layout, row.image_scale
        if row.layout == "trajectory" and shown not in stock:
            stock[shown] = [trajectory_loss(row.image_scale)]
        for ours, expected in zip(result["losses"], stock[shown], strict=row.layout != "trajectory"):
            worst = max(worst, abs(ours - expected))
            if not abs(ours - expected) <= tolerance:
                raise CheckFailedError(f"{row.name}: loss {ours} where stock TRL has {expected}")
    return worst


def throughput_table(results: list[dict[str, Any]], rate: float | None) -> str:
    """Return the rows as a table in Markdown, with the share of `rate` (teraFLOP/s in matrix products) if it is known.

    The ratio of a row may be None: its stock row was not measured.
    """
    columns = ["", "decisions/s", "ratio", "peak MiB of a step", "tokens a decision", "tower calls a step"]
    columns += ["pictures a decision", "teraFLOP a decision", "waiting for data"]
    if rate is not None:
        columns.append(f"share of {rate:.3g} teraFLOP/s")
    lines = [f"|{' |'.join(f' {name}'.rstrip() for name in columns)} |", "|---" * len(columns) + "|"]
    for one in results:
        cells = [
            one["name"],
            f"{one['decisions_per_second']:.3g} ({one['slowest']:.3g}-{one['fastest']:.3g})",
            "–" if one["ratio"] is None else f"{one['ratio']:.1f}",
            f"{one['peak_mib']:.0f}",
            f"{one['tokens_a_decision']:.0f}",
            f"{one['tower_calls']:.0f}",
            f"{one['pictures']:.1f}",
            f"{one['teraflop']:.3g}",
            "not logged" if one["data_wait"] is None else f"{100 * one['data_wait']:.1f} %",
        ]
        if rate is not None:
            cells.append(f"{100 * one['teraflop'] * one['decisions_per_second'] / rate:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    (options,) = cli.parse_options(BenchmarkOptions, description=__doc__)
    if options.row is not None:
        print(json.dumps(run_task(options)))
        return
    with tempfile.TemporaryDirectory(prefix="pokegemma_benchmark_") as temporary:
        if options.dataset_path is None:
            options = replace(options, dataset_path=str(record_dataset(Path(temporary))))
        else:  # features and processors go beside it
            linked = Path(temporary) / "dataset"
            linked.symlink_to(Path(options.dataset_path).resolve())
            options = replace(options, dataset_path=str(linked))
        results = measure(options)
        print(throughput_table(results, rate=None), file=sys.stderr)  # not lost if the losses differ
        worst = check_losses(results, lambda image_scale: call(options, {"trajectory loss": image_scale}))
        rate = call(options, "matrix rate")
    record = {
        "rows": results,
        "largest_loss_difference": worst,
        "tower_to_token": proportions(),
        "matrix_teraflops_per_s": rate,
        "commit": git_commit(),
        "versions": package_versions(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "options": asdict(options),
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(throughput_table(results, rate))
    print(f"\nlosses equal stock TRL's on the same samples, largest difference {worst:.1e}")
    checkpointed = [one for one in results if one["row"]["checkpointing"] and not one["row"]["stock"]]
    most = max(checkpointed, key=lambda one: one["peak_mib"])
    print(f"highest memory with gradient checkpointing after stock TRL's: {most['name']}, {most['peak_mib']:.0f} MiB")
    for one in results:
        if one["features"] and one["features"][0]:
            print("features for {!r}: {} frames in {:.1f} s".format(one["name"], *one["features"]))
    print(", ".join(f"{name}: a picture costs the tower {value:.0f} tokens" for name, value in proportions().items()))
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    cli.run(main)
