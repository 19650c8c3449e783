"""The scripts of the pipeline on the real weights: the GGUF export with its comparison, and QLoRA with its merge."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.part_process import error_in
from benchmarks.gpu_parts.plan import Run
from benchmarks.real_gemma_parts.training import answer_loss
from pokegemma.data.samples import evenly_spread, read_samples
from pokegemma.errors import CheckFailedError
from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.outputs import write_if_changed
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.tables import format_markdown_table

QUANTIZATIONS = ("f16", "q8_0", "q4_k_m")
NUM_COMPARED, NUM_NEW_TOKENS = 4, 24
NUM_TRAINED, NUM_HELD_OUT, NUM_VERIFIED, NUM_STEPS = 8, 4, 2, 6


def call_script(run: Run, name: str, *, statuses: tuple[int, ...] = (0,), **options: Any) -> int:
    """Run a script of the project; what it prints goes to NAME.log in the folder.

    Raises:
        CheckFailedError: its exit status is not among `statuses`.
    """
    words = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{name}.py")]
    for key, value in options.items():
        words += [f"--{key}", *([] if value is True else map(str, value if isinstance(value, tuple) else [value]))]
    log = run.folder / f"{name}.log"
    with open(log, "wb") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT_ROOT, check=False)
    if done.returncode not in statuses:
        raise CheckFailedError(f"scripts/{name}.py: {error_in(log.read_text(encoding='utf-8', errors='replace'))}")
    return done.returncode


def measure_gguf(run: Run) -> dict[str, Any]:
    """Convert to GGUF and compare with llama.cpp; a comparison that fails a gate is a result, too."""
    gguf, parity = run.folder / "gguf", run.folder / "parity"
    call_script(
        run,
        "convert_to_gguf",
        model_path=run.checkpoint,
        output_dir=gguf,
        quantization=QUANTIZATIONS,
        overwrite=True,
    )
    shutil.rmtree(parity, ignore_errors=True)
    call_script(
        run,
        "check_parity",
        statuses=(0, 1),
        model_path=run.checkpoint,
        dataset_path=run.dataset,
        output_dir=parity,
        gguf=gguf,
        layout="grid",
        num_samples=NUM_COMPARED,
        max_new_tokens=NUM_NEW_TOKENS,
    )
    result = json.loads((parity / "parity.json").read_text(encoding="utf-8"))
    files = (read_run_record(gguf) or {})["files"]
    return {"files": files, "parity": result}


def gguf_table(record: dict[str, Any]) -> str:
    parity = record["parity"]
    rows = []
    for engine in (*parity["variants"], *parity["engines"]):
        limit = engine.get("max_log_probability_difference")
        failures = ", ".join(failure["gate"] for failure in engine.get("failures", ()))
        rows.append(
            (
                engine["name"],
                f"{engine['button_agreement'] * parity['num_samples']:.0f} of {parity['num_samples']}",
                *(
                    f"{engine[name]['mean']:.4f} / {engine[name]['max']:.3f}"
                    for name in ("button_log_probability_difference", "log_probability_difference")
                ),
                "" if limit is None else f"{limit:.4f}",
                {None: "", True: "yes", False: "no"}[engine["prompts_equal"]],
                ("pass" if engine["passed"] else f"fail: {failures}") if "passed" in engine else "",
            )
        )
    sizes = ", ".join(f"{name} {file['bytes'] / 2**20:.0f} MiB" for name, file in record["files"].items())
    columns = ("", "button", "Δ buttons, mean / largest", "Δ answer, mean / largest", "limit of the mean")
    return (
        "`scripts/convert_to_gguf.py`, then `scripts/check_parity.py` next to transformers in float32: "
        f"{parity['num_samples']} held-out decisions as grids, answers of {NUM_NEW_TOKENS} tokens. Files: {sizes}.\n\n"
        + format_markdown_table((*columns, "same prompts", ""), rows)
    )


def measure_qlora(run: Run) -> dict[str, Any]:
    """Train a few steps of QLoRA, merge, and return the losses of held-out samples before, with and after.

    An adapter that an earlier call has finished is not trained again. What rounding to bfloat16 costs is a figure here,
    and fails nothing.
    """
    few = write_few_samples(run)
    adapter, merged = run.folder / "adapter", run.folder / "merged"
    if (read_run_record(adapter) or {}).get("status") != "completed":
        train_few_steps(run, few, adapter)
    call_script(
        run,
        "merge_qlora",
        lora_path=adapter,
        output_path=merged,
        verify=True,
        num_samples=NUM_VERIFIED,
        stored_tolerance="inf",
        overwrite=True,
    )
    history = json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "train_loss": [entry["loss"] for entry in history if "loss" in entry],
        "losses": {
            "base, float32": held_out_loss(run.checkpoint, few["eval"]),
            "base, nf4": evaluated[0],
            "base, nf4, with the adapter": evaluated[-1],
            "merged, stored in bfloat16": held_out_loss(merged, few["eval"]),
        },
        "merge": {name: (read_run_record(merged) or {})[name] for name in ("verification", "weights")},
    }


def train_few_steps(run: Run, few: dict[str, Path], adapter: Path) -> None:
    """Train an adapter on nf4 weights, with an evaluation before and after."""
    call_script(
        run,
        "sft_pokemon_gemma3",
        dataset_path=few["train"],
        eval_dataset_path=few["eval"],
        model_name_or_path=run.checkpoint,
        output_dir=adapter,
        finetuning="qlora",
        max_steps=NUM_STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        warmup_steps=0,
        logging_steps=1,
        eval_on_start=True,
        save_strategy="no",
        gradient_checkpointing="false",
        dataloader_num_workers=0,
        report_to="none",
        overwrite=True,
    )


def write_few_samples(run: Run) -> dict[str, Path]:
    """Write a few evenly spread samples of each split next to their pictures, and return both files."""
    files = {}
    for split, count in (("train", NUM_TRAINED), ("eval", NUM_HELD_OUT)):
        samples = evenly_spread(list(read_samples(run.dataset / f"{split}.jsonl")), count)
        files[split] = run.dataset / f"few_{split}.jsonl"
        write_if_changed(files[split], "".join(f"{sample.to_json()}\n" for sample in samples))
    return files


@torch.inference_mode()
def held_out_loss(path: Path, samples: Path) -> float:
    """Return the mean loss of the answers' tokens in float32, with samples as grids."""
    checkpoint = open_checkpoint(path)
    model = checkpoint.load_model()
    collator = checkpoint.collator(layout="grid", dataset_folder=samples.parent)
    losses = [answer_loss(model, collator([sample])) for sample in read_samples(samples)]
    return sum(loss.item() for loss, _ in losses) / sum(number for _, number in losses)


def qlora_table(record: dict[str, Any]) -> str:
    verification, weights = record["merge"]["verification"], record["merge"]["weights"]
    effect, merged, stored = (
        f"{verification[name]:.1e}" for name in ("adapter_effect", "merged_error", "stored_error")
    )
    steps = ", ".join(f"{loss:.2f}" for loss in record["train_loss"])
    table = format_markdown_table(("", "loss"), [(name, f"{loss:.4f}") for name, loss in record["losses"].items()])
    return (
        f"{NUM_STEPS} steps of 2 samples as grids (losses {steps}), then `scripts/merge_qlora.py --verify`. The table "
        f"has the mean loss of the answers of {NUM_HELD_OUT} held-out samples.\n\n{table}\n\n"
        f"The adapter changes the logits by {effect} (relative). Those of merged weights differ from those of adapter "
        f"and base by {merged} in float32, and by {stored} stored in {verification['dtype']} (limits: "
        f"{MERGE_TOLERANCE:.0e} and {STORED_TOLERANCE[verification['dtype']]:.0e}). The adapter changed "
        f"{weights['changed']} tensors; {weights['unchanged']} are those of the base."
    )
