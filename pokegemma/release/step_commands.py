"""The script that each step of a release runs, with its flags, inputs and outputs."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder, hash_of
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import PARITY_FILE, read_json
from pokegemma.release.plan import ReleasePlan
from pokegemma.release.step_runner import Step

_NUM_VERIFIED = 8
"""Samples that the logits of adapter + base and merged weights are compared on."""

_NOT_WEIGHTS = (".png", ".pt", ".pth")  # a loss curve, states of the optimizer

EARLIER_STEPS_READ = {
    "merge": (),
    "evaluate": ("merge",),
    "export_gguf": ("merge",),
    "export_mlx": ("merge",),
    "parity": ("merge", "export_gguf", "export_mlx"),
    "register": ("merge", "evaluate", "export_gguf", "export_mlx", "parity"),
}
"""The earlier steps whose outputs each step reads; the functions below hash these outputs as its `inputs`."""


def build_step(name: str, plan: ReleasePlan, hashes: FileHashes) -> Step:
    """Return a step with the hashes of its inputs, which the steps before it must have written."""
    build = {
        "merge": _merge,
        "evaluate": _evaluate,
        "export_gguf": _export_gguf,
        "export_mlx": _export_mlx,
        "parity": _parity,
        "register": _register,
    }[name]
    return build(plan, hashes)


def _merge(plan: ReleasePlan, hashes: FileHashes) -> Step:
    options = plan.options
    base = options.base_model or read_json(plan.checkpoint / "adapter_config.json").get("base_model_name_or_path") or ""
    return Step(
        name="merge",
        script=["merge_qlora.py"],
        flags={
            "lora_path": plan.checkpoint,
            "output_path": plan.model,
            "dataset_path": plan.held_out.parent,
            "base_model": options.base_model,
            "dtype": options.dtype,
            "verify": True,
            "num_samples": _NUM_VERIFIED,
            "stored_tolerance": "inf",  # the gate has the limit, so that a new one needs no new merge
            "overwrite": True,
        },
        inputs={
            "adapter": hash_adapter(plan.checkpoint, hashes),
            # Of a model on the Hub, its name is enough: merging compares it with training's fingerprint.
            "base model": content_hash(hash_folder(Path(base), hashes)) if base and Path(base).is_dir() else base,
            "samples to verify on": _hash_samples(plan.held_out, hashes, limit=_NUM_VERIFIED),
        },
        outputs=[plan.model],
    )


def _evaluate(plan: ReleasePlan, hashes: FileHashes) -> Step:
    return Step(
        name="evaluate",
        script=["evaluate.py"],
        flags={
            "model_path": plan.model,
            "dataset_path": plan.held_out,
            "output_dir": plan.evaluation,
            "max_samples": plan.options.max_samples,
            "generate": plan.options.generate,
            "device": plan.options.device,
            "overwrite": True,
        },
        inputs={
            **_hash_model(plan, hashes),
            "eval.jsonl": _hash_samples(plan.held_out, hashes),
            "train.jsonl": hashes.of(plan.train),
        },
        outputs=[plan.evaluation],
    )


def _export_gguf(plan: ReleasePlan, hashes: FileHashes) -> Step:
    converter = Path(plan.options.llama_cpp_dir) if plan.options.llama_cpp_dir else None
    return Step(
        name="export_gguf",
        script=["convert_to_gguf.py"],
        flags={
            "model_path": plan.model,
            "output_dir": plan.exports["gguf"],
            "quantization": plan.options.quantization,
            "llama_cpp_dir": converter,
            "overwrite": True,
        },
        inputs={
            **_hash_model(plan, hashes),
            **({"converter": hashes.of(converter / "convert_hf_to_gguf.py")} if converter else {}),
        },
        outputs=[plan.exports["gguf"]],
    )


def _export_mlx(plan: ReleasePlan, hashes: FileHashes) -> Step:
    return Step(
        name="export_mlx",
        script=["convert_to_mlx.py"],
        flags={
            "model_path": plan.model,
            "output_path": plan.exports["mlx"],
            "quantization_bits": plan.options.quantization_bits,
            "overwrite": True,
        },
        inputs=_hash_model(plan, hashes),
        outputs=[plan.exports["mlx"]],
    )


def _parity(plan: ReleasePlan, hashes: FileHashes) -> Step:
    return Step(
        name="parity",
        script=["check_parity.py"],
        flags={
            "model_path": plan.model,
            "dataset_path": plan.held_out.parent,
            "output_dir": plan.parity,
            **plan.exports,
            "num_samples": plan.options.parity_samples,
            "min_agreement": 0,  # the gate has the limit, so that a new one needs no new comparison
            "overwrite": True,
        },
        inputs={
            **_hash_model(plan, hashes),
            **_hash_folders(plan.exports, hashes),
            "eval.jsonl": _hash_samples(plan.held_out, hashes),
        },
        outputs=[plan.parity],
        measurement=plan.parity / PARITY_FILE,
    )


def _register(plan: ReleasePlan, hashes: FileHashes) -> Step:
    results = {"evaluation": plan.evaluation, **({"parity": plan.parity} if plan.exports else {})}
    return Step(
        name="register",
        script=["model_registry.py", "register"],
        flags={
            "model_path": plan.model,
            **results,
            "exports": list(plan.exports.values()) or None,
            "output": plan.registration,
            "registry_uri": plan.options.registry_uri,
            "name": plan.options.name,
            "copy": plan.options.copy,
        },
        inputs={**_hash_model(plan, hashes), **_hash_folders({**results, **plan.exports}, hashes)},
        outputs=[plan.registration],
        why_result_is_missing=lambda: _find_lost_version(plan, hashes),
    )


def _find_lost_version(plan: ReleasePlan, hashes: FileHashes) -> str | None:
    """Return why the registry no longer has the version that was registered, None if it has."""
    from pokegemma.release.registry import Registry  # loads MLflow, which only this step needs

    version = str(read_json(plan.registration)["version"])
    try:
        registry = Registry(plan.options.registry_uri, plan.options.name)
        content, missing = registry.describe(version)["content_sha256"], registry.missing_parts(version)
    except PokegemmaError as error:
        return str(error)
    if content != content_hash(hash_folder(plan.model, hashes)):  # the registry was deleted and started again
        return f"version {version} is another model now"
    missing = [part for part in ("model", *plan.exports) if part in missing]
    return f"the files of version {version} were moved: {', '.join(missing)}" if missing else None


def hash_adapter(folder: Path, hashes: FileHashes) -> str:
    """Hash what merging reads: the adapter's files without the training state next to them, and its run.json."""
    files = {
        path.name: hashes.of(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in _NOT_WEIGHTS
        and path.name not in (RUN_FILE, CARD_FILE, "training_args.bin")
    }
    return hash_of([files, read_run_record(folder)])


def _hash_folders(folders: Mapping[str, Path], hashes: FileHashes) -> dict[str, str]:
    return {name: content_hash(hash_folder(folder, hashes)) for name, folder in folders.items()}


def _hash_model(plan: ReleasePlan, hashes: FileHashes) -> dict[str, str]:
    return {
        **_hash_folders({"model": plan.model}, hashes),
        "the model's run.json": hash_of(read_run_record(plan.model)),
    }


def _hash_samples(path: Path, hashes: FileHashes, *, limit: int | None = None) -> str:
    """Hash the samples of a JSONL file, or its first `limit`, with the pictures that they name."""
    samples = list(islice(read_samples(path), limit))
    names = {name for sample in samples for name in (*sample.frames, sample.image) if name}
    pictures = {name: hashes.of(path.parent / name) for name in sorted(names) if (path.parent / name).is_file()}
    return hash_of([hashes.of(path) if limit is None else [sample.to_json() for sample in samples], pictures])
