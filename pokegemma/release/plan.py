"""The steps of a release: the script that each runs, with its flags, what it reads and what it writes."""

import importlib.util
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pokegemma.data.samples import dataset_files, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import read_json
from pokegemma.release.options import EXPORTS, PipelineOptions
from pokegemma.release.step_runner import Step

_EXTRAS = {"gguf": ("gguf", "llama_cpp"), "mlx": ("mlx", "mlx_vlm"), "register": ("registry", "mlflow")}

_NUM_VERIFIED = 8
"""Samples that the logits of adapter + base and merged weights are compared on."""

_NOT_WEIGHTS = (".png", ".pt", ".pth")  # a loss curve, states of the optimizer


def make_steps(options: PipelineOptions) -> list[Step]:
    """Check what can be checked before any work, and return the steps in order.

    Raises:
        PokegemmaError: the checkpoint, the dataset or an optional part of the installation is missing.
    """
    checkpoint, output_dir = Path(options.checkpoint).absolute(), Path(options.output_dir).absolute()
    if not checkpoint.is_dir():
        raise PokegemmaError(f"--checkpoint {options.checkpoint}: no such folder")
    is_adapter = not (checkpoint / "config.json").is_file()
    if is_adapter and not (checkpoint / "adapter_config.json").is_file():
        raise PokegemmaError(
            f"--checkpoint {checkpoint}: neither an adapter (adapter_config.json) nor a model (config.json)"
        )
    train, held_out = dataset_files(Path(options.dataset_path))
    if held_out is None:
        raise PokegemmaError(f"--dataset_path {options.dataset_path}: no eval.jsonl to evaluate on")
    for part, (extra, module) in _EXTRAS.items():
        is_needed = options.register if part == "register" else part in options.exports
        if is_needed and importlib.util.find_spec(module) is None:
            raise PokegemmaError(f"{part} needs {module}: run ./init.sh --with {extra}, or leave it out")
    if output_dir.exists() and not output_dir.is_dir():
        raise PokegemmaError(f"--output_dir {output_dir}: not a folder")
    steps = [_merge(options, checkpoint, held_out, output_dir / "merged")] if is_adapter else []
    return [*steps, *_steps_of_a_model(options, steps[0].output if steps else checkpoint, train, held_out)]


def _merge(options: PipelineOptions, adapter: Path, held_out: Path, output: Path) -> Step:
    base = options.base_model or read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    return Step(
        "merge",
        # The gate has the limit, so that a new one needs no new merge; the same for parity.
        f"merge_qlora.py --verify --num_samples {_NUM_VERIFIED} --stored_tolerance inf --overwrite",
        output=output,
        paths={"lora_path": adapter, "output_path": output, "dataset_path": held_out.parent},
        settings={"base_model": options.base_model, "dtype": options.dtype},
        inputs={
            "adapter": {**list_adapter(adapter), RUN_FILE: read_run_record(adapter)},
            # Of a model on the Hub, its name is enough: merging compares it with training's fingerprint.
            "base model": Path(base) if base and Path(base).is_dir() else base,
            "samples to verify on": list_samples(held_out, limit=_NUM_VERIFIED),
        },
    )


def _steps_of_a_model(options: PipelineOptions, model: Path, train: Path, held_out: Path) -> Iterator[Step]:
    output_dir, samples = Path(options.output_dir).absolute(), list_samples(held_out)
    inputs = {"model": model, "run.json": read_run_record(Path(options.checkpoint))}  # not in the folder checkpoint-N
    results = {"evaluation": output_dir / "evaluation"}
    yield Step(
        "evaluate",
        "evaluate.py --overwrite",
        output=results["evaluation"],
        paths={"model_path": model, "dataset_path": held_out, "output_dir": results["evaluation"]},
        settings={
            "max_samples": options.max_samples,
            "generate": options.generate,
            "device": options.device,
            **_play_settings(options),
        },
        inputs={**inputs, "eval.jsonl": samples, "train.jsonl": train},
    )
    exports = {kind: output_dir / kind for kind in EXPORTS if kind in options.exports}
    if "gguf" in exports:
        converter = Path(options.llama_cpp_dir) if options.llama_cpp_dir else None
        yield Step(
            "export_gguf",
            "convert_to_gguf.py --overwrite",
            output=exports["gguf"],
            paths={"model_path": model, "output_dir": exports["gguf"], "llama_cpp_dir": converter},
            settings={"quantization": options.quantization},
            inputs={**inputs, "converter": converter and converter / "convert_hf_to_gguf.py"},
        )
    if "mlx" in exports:
        yield Step(
            "export_mlx",
            "convert_to_mlx.py --overwrite",
            output=exports["mlx"],
            paths={"model_path": model, "output_path": exports["mlx"]},
            settings={"quantization_bits": options.quantization_bits},
            inputs=inputs,
        )
    if exports:
        results["parity"] = output_dir / "parity"
        folders = {"model_path": model, "dataset_path": held_out.parent, "output_dir": results["parity"]}
        yield Step(
            "parity",
            "check_parity.py --min_agreement 0 --overwrite",
            output=results["parity"],
            paths={**folders, **exports},
            settings={"num_samples": options.parity_samples},
            inputs={**inputs, **exports, "eval.jsonl": samples},
            is_check=True,
        )
    if options.register:
        output, folders = output_dir / "registration.json", list(exports.values()) or None
        yield Step(
            "register",
            "model_registry.py register",
            output=output,
            paths={"model_path": model, **results, "exports": folders, "output": output},
            settings={"registry_uri": options.registry_uri, "name": options.name, "copy": options.copy},
            inputs={"model": model, **results, **exports},
            why_result_is_missing=lambda: _find_lost_version(options, output, {"model": model, **exports}),
        )


def _play_settings(options: PipelineOptions) -> dict[str, Any]:
    """Return the flags of play; none without --closed_loop, so that earlier results stay valid."""
    if options.closed_loop is None:
        return {}
    return {"closed_loop": options.closed_loop, "level": options.level, "noise": options.noise}


def _find_lost_version(options: PipelineOptions, registration: Path, parts: Mapping[str, Path]) -> str | None:
    """Return why the registry no longer has the version that was registered, None if it has."""
    from pokegemma.release.registry import Registry  # loads MLflow, which only this step needs

    version = str(read_json(registration)["version"])
    try:
        registry = Registry(options.registry_uri, options.name)
        content, lost = registry.describe(version)["content_sha256"], registry.missing_parts(version)
    except PokegemmaError as error:
        return str(error)
    if content != content_hash(hash_folder(parts["model"], FileHashes())):  # the registry was started again
        return f"version {version} is another model now"
    lost = [part for part in parts if part in lost]
    return f"the files of version {version} were moved: {', '.join(lost)}" if lost else None


def list_adapter(folder: Path) -> dict[str, Path]:
    """Return what merging reads, by name: the adapter's files without the training state next to them."""
    not_read = (RUN_FILE, CARD_FILE, "training_args.bin")
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in _NOT_WEIGHTS]
    return {path.name: path for path in files if path.name not in not_read}


def list_samples(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Return the samples of a JSONL file, or its first `limit`, and the pictures that they name."""
    samples = list(islice(read_samples(path), limit))
    pictures = {name: path.parent / name for sample in samples for name in (*sample.frames, sample.image) if name}
    return {
        "samples": [sample.to_json() for sample in samples],
        "pictures": {name: picture for name, picture in pictures.items() if picture.is_file()},
    }
