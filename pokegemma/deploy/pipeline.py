"""From a checkpoint to a registered version: merge, verify, evaluate, export, parity, register, and perhaps the Hub."""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pokegemma.data.samples import Sample, dataset_files, read_samples
from pokegemma.deploy.content import CARD_FILE, FileHashes, content_hash, hash_folder, hash_of
from pokegemma.deploy.results import METRICS_FILE, PARITY_FILE, read_json, summarize_evaluation
from pokegemma.deploy.steps import Gate, State, Step, check_gates, run_step
from pokegemma.deploy.tolerances import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record

logger = logging.getLogger(__name__)

EXPORTS = ("gguf", "mlx")
_EXTRAS = {"gguf": ("gguf", "llama_cpp"), "mlx": ("mlx", "mlx_vlm"), "register": ("registry", "mlflow")}
_VOLATILE = ("created", "machine", "git_commit", "versions")
"""What in a run.json is not about the model: a step that is done again may differ in it."""


@dataclass
class PipelineOptions:
    """What to make of which checkpoint, and what is asked of it on the way."""

    checkpoint: str = field(metadata={"help": "Folder of a trained adapter, or of a whole model (nothing to merge)."})
    dataset_path: str = field(metadata={"help": "Folder with eval.jsonl and train.jsonl."})
    output_dir: str = field(metadata={"help": "Folder for everything; of an earlier run it is continued."})
    exports: list[str] = field(default_factory=lambda: ["gguf"], metadata={"help": "gguf, mlx, both, or none."})
    quantization: list[str] = field(
        default_factory=lambda: ["f16", "q8_0"], metadata={"help": "Types of the GGUF files."}
    )
    quantization_bits: int = field(default=16, metadata={"help": "Bits of the MLX weights: 4, 8 or 16."})
    llama_cpp_dir: str | None = field(default=None, metadata={"help": "As of scripts/convert_to_gguf.py."})
    base_model: str | None = field(default=None, metadata={"help": "Base checkpoint; default: the adapter's."})
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "Type of the merged weights."})
    device: str | None = field(default=None, metadata={"help": "Where to evaluate. Default: the best there is."})
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate on about so many. Default: all."})
    generate: bool = field(default=True, metadata={"help": "Also evaluate whole answers; --no_generate scores only."})
    parity_samples: int = field(default=50, metadata={"help": "Samples that the exports are compared on."})
    max_stored_difference: float | None = field(
        default=None,
        metadata={"help": "Gate of verify: merged weights as stored, against adapter + base. Default: by --dtype."},
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "Gate of evaluate: share of right buttons."})
    min_gain_over_baseline: float = field(
        default=0.0, metadata={"help": "Gate of evaluate: accuracy above the best baseline's; 0.05 is five points."}
    )
    max_export_gib: float | None = field(
        default=None, metadata={"help": "Gate of each export: the smallest model in it, with its vision part."}
    )
    min_agreement: float = field(
        default=0.98, metadata={"help": "Gate of parity: share of samples where an export presses the same button."}
    )
    max_log_probability_difference: float | None = field(
        default=None,
        metadata={"help": "Gate of parity: mean difference in log-probability. Default: by the type of the weights."},
    )
    register: bool = field(default=True, metadata={"help": "--no_register leaves that out."})
    registry_uri: str = field(
        default="outputs/registry/registry.db", metadata={"help": "As of scripts/model_registry.py."}
    )
    name: str = field(default="pokegemma", metadata={"help": "Name of the model in the registry."})
    copy: bool = field(default=False, metadata={"help": "Let the registry keep a copy of the files."})
    license: str | None = field(
        default=None, metadata={"help": "Licence id for the model card. Default: that of the base's family."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository on the Hub to upload to at the end."})
    hub_public: bool = field(default=False, metadata={"help": "Make that repository public if it is new."})
    dry_run: bool = field(default=False, metadata={"help": "Say which steps would run, and why; run none."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON."})

    def __post_init__(self) -> None:
        for kind in self.exports:
            if kind not in (*EXPORTS, "none"):
                raise PokegemmaError(f"--exports: {kind!r} is not one of {', '.join(EXPORTS)}, none")
        if "none" in self.exports and len(self.exports) > 1:
            raise PokegemmaError(f"--exports: none and {', '.join(set(self.exports) - {'none'})} contradict each other")
        for name in ("parity_samples", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PokegemmaError(f"--{name}: {value} is not at least 1")


@dataclass(frozen=True)
class Plan:
    """The steps in order, and where things lie. `merges`: whether the checkpoint is an adapter."""

    options: PipelineOptions
    output_dir: Path
    merges: bool
    model: Path
    held_out: Path
    steps: tuple[Step, ...]
    exports: Mapping[str, Path]

    def place(self, name: str) -> Path:
        """Return where something of this name lies in the output folder."""
        return self.output_dir / name


def make_plan(options: PipelineOptions) -> Plan:
    """Check what can be checked before any work, and return the steps.

    Raises:
        PokegemmaError: something is not there: checkpoint, dataset, an optional part of the installation.
    """
    checkpoint, output_dir = Path(options.checkpoint), Path(options.output_dir).absolute()
    if not checkpoint.is_dir():
        raise PokegemmaError(f"--checkpoint {checkpoint}: no such folder")
    merges = not (checkpoint / "config.json").is_file()
    if merges and not (checkpoint / "adapter_config.json").is_file():
        raise PokegemmaError(f"--checkpoint {checkpoint}: no adapter (adapter_config.json) and no model (config.json)")
    train, held_out = dataset_files(Path(options.dataset_path))
    if held_out is None:
        raise PokegemmaError(f"--dataset_path {options.dataset_path}: no eval.jsonl to evaluate on")
    exports = {kind: output_dir / kind for kind in EXPORTS if kind in options.exports}
    for part in (*exports, *(["register"] if options.register else [])):
        extra, module = _EXTRAS[part]
        if importlib.util.find_spec(module) is None:
            raise PokegemmaError(f"{part} needs {module}: ./init.sh --with {extra}, or leave it out")
    if output_dir.exists() and not output_dir.is_dir():
        raise PokegemmaError(f"--output_dir {output_dir}: not a folder")
    model = output_dir / "merged" if merges else checkpoint.absolute()
    steps = _Builder(options, output_dir, model, checkpoint.absolute(), train, held_out, exports, merges)
    return Plan(options, output_dir, merges, model, held_out, tuple(steps.build()), exports)


@dataclass(frozen=True)
class _Builder:
    options: PipelineOptions
    output_dir: Path
    model: Path
    checkpoint: Path
    train: Path
    held_out: Path
    exports: Mapping[str, Path]
    merges: bool

    def build(self) -> Iterator[Step]:
        if self.merges:
            yield self.merge()
        yield self.evaluate()
        if "gguf" in self.exports:
            yield self.export_gguf()
        if "mlx" in self.exports:
            yield self.export_mlx()
        if self.exports:
            yield self.parity()
        if self.options.register:
            yield self.register()

    def merge(self) -> Step:
        options, base = self.options, []
        if options.base_model:
            base = ["--base_model", options.base_model]
        return Step(
            name="merge", script="merge_qlora.py",
            paths={"--lora_path": [self.checkpoint], "--output_path": [self.model],
                   "--dataset_path": [self.held_out.parent]},
            # Verification measures here; its gate judges, so that another limit needs no other merge.
            settings=["--verify", "--stored_tolerance", "inf", "--dtype", options.dtype, *base, "--overwrite"],
            inputs=lambda hashes: {
                "adapter": _hash_adapter(self.checkpoint, hashes),
                "base model": _hash_base(options.base_model or _base_of(self.checkpoint), hashes),
                "samples to verify on": _hash_samples(self.held_out, hashes, limit=8),
            },
            outputs=[self.model], gates=self.verify_gates,
        )  # fmt: skip

    def verify_gates(self) -> list[Gate]:
        verification = (read_run_record(self.model) or {}).get("verification") or {}
        limit = self.options.max_stored_difference
        if limit is None:
            limit = STORED_TOLERANCE[self.options.dtype]
        return [
            Gate("its limit", "merged against adapter + base", verification.get("merged_error"), MERGE_TOLERANCE,
                 at_least=False),
            Gate("--max_stored_difference", f"stored as {self.options.dtype} against adapter + base",
                 verification.get("stored_error"), limit, at_least=False),
        ]  # fmt: skip

    def model_inputs(self, hashes: FileHashes) -> dict[str, str]:
        record = {key: value for key, value in (read_run_record(self.model) or {}).items() if key not in _VOLATILE}
        return {"model": content_hash(hash_folder(self.model, hashes)),
                "the model's run.json": hash_of(_without_paths(record))}  # fmt: skip

    def evaluate(self) -> Step:
        options, place = self.options, self.output_dir / "evaluation"
        settings = ["--overwrite"]
        settings += [] if options.max_samples is None else ["--max_samples", str(options.max_samples)]
        settings += [] if options.generate else ["--no_generate"]
        settings += [] if options.device is None else ["--device", options.device]
        return Step(
            name="evaluate", script="evaluate.py",
            paths={"--model_path": [self.model], "--dataset_path": [self.held_out], "--output_dir": [place]},
            settings=settings,
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                "eval.jsonl": _hash_samples(self.held_out, hashes),
                "train.jsonl": hashes.of(self.train),
            },
            outputs=[place], after=self.model_steps(), gates=lambda: self.evaluate_gates(place),
        )  # fmt: skip

    def evaluate_gates(self, place: Path) -> list[Gate]:
        summary = summarize_evaluation(read_json(place / METRICS_FILE))
        gain = summary["points_above_baseline"] / 100
        gates = [
            Gate("--min_gain_over_baseline", "accuracy above the best baseline's", gain,
                 self.options.min_gain_over_baseline)
        ]  # fmt: skip
        if self.options.min_accuracy is not None:
            gates.append(Gate("--min_accuracy", "accuracy", summary["accuracy"], self.options.min_accuracy))
        return gates

    def model_steps(self) -> list[str]:
        return ["merge"] if self.merges else []

    def export_gguf(self) -> Step:
        place, converter = self.exports["gguf"], self.options.llama_cpp_dir
        paths: dict[str, Sequence[Path]] = {"--model_path": [self.model], "--output_dir": [place]}
        if converter:
            paths["--llama_cpp_dir"] = [Path(converter)]
        return Step(
            name="export_gguf", script="convert_to_gguf.py", paths=paths,
            settings=["--quantization", *self.options.quantization, "--overwrite"],
            inputs=lambda hashes: self.model_inputs(hashes) | (
                {"converter": hashes.of(Path(converter, "convert_hf_to_gguf.py"))} if converter else {}
            ),
            outputs=[place], after=self.model_steps(), gates=lambda: self.size_gates(place),
        )  # fmt: skip

    def export_mlx(self) -> Step:
        place = self.exports["mlx"]
        return Step(
            name="export_mlx", script="convert_to_mlx.py",
            paths={"--model_path": [self.model], "--output_path": [place]},
            settings=["--quantization_bits", str(self.options.quantization_bits), "--overwrite"],
            inputs=self.model_inputs, outputs=[place], after=self.model_steps(), gates=lambda: self.size_gates(place),
        )  # fmt: skip

    def size_gates(self, place: Path) -> list[Gate]:
        """Ask that the smallest model of an export, with its vision part, fits."""
        if self.options.max_export_gib is None:
            return []
        sizes = {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}
        models = [size for name, size in sizes.items() if name.startswith("model-") and name.endswith(".gguf")]
        vision = sum(size for name, size in sizes.items() if name.startswith("mmproj-"))
        smallest = (min(models) + vision if models else sum(sizes.values())) / 2**30
        return [Gate("--max_export_gib", f"smallest model in {place.name}", smallest, self.options.max_export_gib,
                     at_least=False)]  # fmt: skip

    def parity(self) -> Step:
        place = self.output_dir / "parity"
        return Step(
            name="parity", script="check_parity.py",
            paths={"--model_path": [self.model], "--dataset_path": [self.held_out.parent], "--output_dir": [place],
                   **{f"--{kind}": [path] for kind, path in self.exports.items()}},
            settings=["--num_samples", str(self.options.parity_samples), "--min_agreement", "0", "--overwrite"],
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                "eval.jsonl": _hash_samples(self.held_out, hashes),
                **{kind: content_hash(hash_folder(path, hashes)) for kind, path in self.exports.items()},
            },
            outputs=[place], after=[*self.model_steps(), *(f"export_{kind}" for kind in self.exports)],
            gates=lambda: self.parity_gates(place),
            measures=place / PARITY_FILE,
        )  # fmt: skip

    def parity_gates(self, place: Path) -> list[Gate]:
        """Judge agreement here, so that another limit needs no other comparison; the rest as the script judged it."""
        gates, override = [], self.options.max_log_probability_difference
        for engine in read_json(place / PARITY_FILE)["engines"]:
            for key in ("button_agreement", "written_agreement"):
                if engine[key] is not None:  # a model that writes no valid answer has none to agree on
                    what = f"{engine['name']} {key}"
                    gates.append(Gate("--min_agreement", what, engine[key], self.options.min_agreement))
            for key in ("button_log_probability_difference", "log_probability_difference"):
                if override is not None and engine[key] is not None:
                    gates.append(Gate("--max_log_probability_difference", f"{engine['name']} {key}",
                                      engine[key]["mean"], override, at_least=False))  # fmt: skip
            for failure in engine["failures"]:
                if override is None or not failure["gate"].endswith("log_probability_difference"):
                    limit_name = "--max_log_probability_difference" if "log_prob" in failure["gate"] else "its limit"
                    gates.append(Gate(limit_name, f"{engine['name']} {failure['gate']}", float(failure["value"]),
                                      float(failure["limit"]), at_least="log_prob" not in failure["gate"]))  # fmt: skip
        return gates

    def register(self) -> Step:
        options, place = self.options, self.output_dir / "registration.json"
        folders = {"--evaluation": self.output_dir / "evaluation"}
        if self.exports:
            folders["--parity"] = self.output_dir / "parity"
        paths = {"--model_path": [self.model], "--output": [place], **{key: [path] for key, path in folders.items()}}
        if self.exports:
            paths["--exports"] = list(self.exports.values())
        return Step(
            name="register", script="model_registry.py", paths=paths,
            settings=["--registry_uri", options.registry_uri, "--name", options.name, "--copy", str(options.copy)],
            command_words=("register",),
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                **{path.name: content_hash(hash_folder(path, hashes)) for path in folders.values()},
                **{kind: content_hash(hash_folder(path, hashes)) for kind, path in self.exports.items()},
            },
            outputs=[place], after=[*self.model_steps(), "evaluate", *(["parity"] if self.exports else [])],
            lost=lambda: self.lost_version(place),
        )  # fmt: skip

    def lost_version(self, place: Path) -> str | None:
        """Say why the registry no longer has what was registered."""
        from pokegemma.deploy.registry import Registry

        version = str(read_json(place)["version"])
        try:
            missing = Registry(self.options.registry_uri, self.options.name).missing_parts(version)
        except PokegemmaError as error:
            return str(error)
        gone = [part for part in ("model", *self.exports) if part in missing]
        return f"version {version} names a place where its {' and '.join(gone)} no longer is" if gone else None


def _without_paths(value: Any) -> Any:
    """Leave absolute paths out: where a thing lies does not change what it is."""
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value


def _hash_adapter(folder: Path, hashes: FileHashes) -> str:
    """Hash what merging reads: the files themselves, not the folders of training beside them, nor its loss curve."""
    ignored = (".png", ".pt", ".pth")
    files = {
        path.name: hashes.of(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in ignored and path.name not in (RUN_FILE, CARD_FILE, "training_args.bin")
    }
    return hash_of([files, read_run_record(folder)])


def _base_of(adapter: Path) -> str:
    return read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""


def _hash_base(base: str, hashes: FileHashes) -> str:
    """Hash a folder's files; of a model on the Hub, its name, since merging compares it with training's fingerprint."""
    return content_hash(hash_folder(Path(base), hashes)) if Path(base).is_dir() else hash_of(base)


def _hash_samples(path: Path, hashes: FileHashes, *, limit: int | None = None) -> str:
    """Hash the first `limit` samples of a JSONL file with their pictures."""
    samples: list[Sample] = list(islice(read_samples(path), limit))
    names = {name for sample in samples for name in (*sample.frames, sample.image) if name}
    there = sorted(name for name in names if (path.parent / name).is_file())
    return hash_of([[sample.to_json() for sample in samples], {name: hashes.of(path.parent / name) for name in there}])


def explain(plan: Plan, state: State) -> list[tuple[str, str]]:
    """Return for every step what it would do: "unchanged", or why it runs."""
    explained, running = [], set[str]()
    if not plan.merges:
        explained.append(("merge", f"left out: {plan.options.checkpoint} is a whole model"))
    for step in plan.steps:
        upstream = [name for name in step.after if name in running]
        reason = f"runs if what {' or '.join(upstream)} makes differs" if upstream else state.why(step)
        if upstream and step.name not in state.steps:
            reason = "runs: not done yet"
        elif reason and not upstream:
            reason = f"runs: {reason}"
        if reason:
            running.add(step.name)
        explained.append((step.name, reason or "unchanged"))
    return explained


def run_plan(plan: Plan, state: State, *, lock: int) -> list[tuple[str, bool, float]]:
    """Run what has to run, check every gate, write the model card before registering.

    Returns:
        (step, whether it ran, seconds it took when it did) of each step.

    Raises:
        CheckFailedError: a step or a gate failed; what was done before stays and is not done again.
    """
    from pokegemma.deploy.model_card import write_cards

    done = []
    if not plan.merges:
        logger.info("merge: left out, %s is a whole model; nothing to verify", plan.options.checkpoint)
    carded = False
    for step in plan.steps:
        if step.name == "register":
            write_cards(plan)
            carded = True
        reason = state.why(step)
        if reason:
            logger.info("%s: %s", step.name, reason)
            run_step(step, state, lock=lock)
        else:
            logger.info("%s: unchanged, not done again", step.name)
        check_gates({"merge": "verify"}.get(step.name, step.name), step.gates())
        done.append((step.name, reason is not None, state.steps[step.name]["seconds"]))
    if not carded:
        write_cards(plan)
    state.write()  # hashes of files that were looked at
    return done


def read_version(plan: Plan) -> int | None:
    """Return the version that was registered, None where that was left out."""
    if not plan.options.register:
        return None
    return json.loads(plan.place("registration.json").read_text(encoding="utf-8"))["version"]
