"""The steps of a release: which script each runs, what it depends on, and the gates of what it measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.export.tolerances import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder, hash_of
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import METRICS_FILE, PARITY_FILE, read_json, summarize_evaluation
from pokegemma.release.options import PipelineOptions
from pokegemma.release.step_runner import Gate, Step

_VOLATILE = ("created", "machine", "git_commit", "versions")
"""What in a run.json is not about the model: a step that is done again may differ in it."""


@dataclass(frozen=True)
class StepBuilder:
    """What the steps have in common: the options, and where things lie."""

    options: PipelineOptions
    output_dir: Path
    model: Path
    checkpoint: Path
    train: Path
    held_out: Path
    exports: Mapping[str, Path]
    merges: bool

    def build(self) -> Iterator[Step]:
        """Yield the steps in order."""
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
            name="merge",
            script="merge_qlora.py",
            paths={
                "--lora_path": [self.checkpoint],
                "--output_path": [self.model],
                "--dataset_path": [self.held_out.parent],
            },
            # Verification measures here; its gate judges, so that another limit needs no other merge.
            settings=["--verify", "--stored_tolerance", "inf", "--dtype", options.dtype, *base, "--overwrite"],
            inputs=lambda hashes: {
                "adapter": hash_adapter(self.checkpoint, hashes),
                "base model": _hash_base(options.base_model or _base_of(self.checkpoint), hashes),
                "samples to verify on": _hash_samples(self.held_out, hashes, limit=8),
            },
            outputs=[self.model],
            gates=self.verify_gates,
        )

    def verify_gates(self) -> list[Gate]:
        verification = (read_run_record(self.model) or {}).get("verification") or {}
        limit = self.options.max_stored_difference
        if limit is None:
            limit = STORED_TOLERANCE[self.options.dtype]
        return [
            Gate(
                "its limit",
                "merged against adapter + base",
                verification.get("merged_error"),
                MERGE_TOLERANCE,
                at_least=False,
            ),
            Gate(
                "--max_stored_difference",
                f"stored as {self.options.dtype} against adapter + base",
                verification.get("stored_error"),
                limit,
                at_least=False,
            ),
        ]

    def model_inputs(self, hashes: FileHashes) -> dict[str, str]:
        record = {key: value for key, value in (read_run_record(self.model) or {}).items() if key not in _VOLATILE}
        return {
            "model": content_hash(hash_folder(self.model, hashes)),
            "the model's run.json": hash_of(_without_paths(record)),
        }

    def evaluate(self) -> Step:
        options, place = self.options, self.output_dir / "evaluation"
        settings = ["--overwrite"]
        settings += [] if options.max_samples is None else ["--max_samples", str(options.max_samples)]
        settings += [] if options.generate else ["--no_generate"]
        settings += [] if options.device is None else ["--device", options.device]
        return Step(
            name="evaluate",
            script="evaluate.py",
            paths={"--model_path": [self.model], "--dataset_path": [self.held_out], "--output_dir": [place]},
            settings=settings,
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                "eval.jsonl": _hash_samples(self.held_out, hashes),
                "train.jsonl": hashes.of(self.train),
            },
            outputs=[place],
            after=self.model_steps(),
            gates=lambda: self.evaluate_gates(place),
        )

    def evaluate_gates(self, place: Path) -> list[Gate]:
        summary = summarize_evaluation(read_json(place / METRICS_FILE))
        gain = summary["points_above_baseline"] / 100
        gates = [
            Gate(
                "--min_gain_over_baseline",
                "accuracy above the best baseline's",
                gain,
                self.options.min_gain_over_baseline,
            )
        ]
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
            name="export_gguf",
            script="convert_to_gguf.py",
            paths=paths,
            settings=["--quantization", *self.options.quantization, "--overwrite"],
            inputs=lambda hashes: (
                self.model_inputs(hashes)
                | ({"converter": hashes.of(Path(converter, "convert_hf_to_gguf.py"))} if converter else {})
            ),
            outputs=[place],
            after=self.model_steps(),
            gates=lambda: self.size_gates(place),
        )

    def export_mlx(self) -> Step:
        place = self.exports["mlx"]
        return Step(
            name="export_mlx",
            script="convert_to_mlx.py",
            paths={"--model_path": [self.model], "--output_path": [place]},
            settings=["--quantization_bits", str(self.options.quantization_bits), "--overwrite"],
            inputs=self.model_inputs,
            outputs=[place],
            after=self.model_steps(),
            gates=lambda: self.size_gates(place),
        )

    def size_gates(self, place: Path) -> list[Gate]:
        """Ask that the smallest model of an export, with its vision part, fits."""
        if self.options.max_export_gib is None:
            return []
        sizes = {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()}
        models = [size for name, size in sizes.items() if name.startswith("model-") and name.endswith(".gguf")]
        vision = sum(size for name, size in sizes.items() if name.startswith("mmproj-"))
        smallest = (min(models) + vision if models else sum(sizes.values())) / 2**30
        return [
            Gate(
                "--max_export_gib",
                f"smallest model in {place.name}",
                smallest,
                self.options.max_export_gib,
                at_least=False,
            )
        ]

    def parity(self) -> Step:
        place = self.output_dir / "parity"
        return Step(
            name="parity",
            script="check_parity.py",
            paths={
                "--model_path": [self.model],
                "--dataset_path": [self.held_out.parent],
                "--output_dir": [place],
                **{f"--{kind}": [path] for kind, path in self.exports.items()},
            },
            settings=["--num_samples", str(self.options.parity_samples), "--min_agreement", "0", "--overwrite"],
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                "eval.jsonl": _hash_samples(self.held_out, hashes),
                **{kind: content_hash(hash_folder(path, hashes)) for kind, path in self.exports.items()},
            },
            outputs=[place],
            after=[*self.model_steps(), *(f"export_{kind}" for kind in self.exports)],
            gates=lambda: self.parity_gates(place),
            measures=place / PARITY_FILE,
        )

    def parity_gates(self, place: Path) -> list[Gate]:
        """Judge agreement here, so that another limit needs no other comparison; the rest as the script judged it."""
        gates, override = [], self.options.max_log_probability_difference
        for engine in read_json(place / PARITY_FILE)["engines"]:
            if "button_agreement" not in engine:  # it did not run
                what = f"{engine['name']} failed ({engine['failures'][0]['message']}), its agreement"
                gates.append(Gate("--min_agreement", what, None, self.options.min_agreement))
                continue
            for key in ("button_agreement", "written_agreement"):
                if engine[key] is not None:  # a model that writes no valid answer has none to agree on
                    what = f"{engine['name']} {key}"
                    gates.append(Gate("--min_agreement", what, engine[key], self.options.min_agreement))
            for key in ("button_log_probability_difference", "log_probability_difference"):
                if override is not None and engine[key] is not None:
                    gates.append(
                        Gate(
                            "--max_log_probability_difference",
                            f"{engine['name']} {key}",
                            engine[key]["mean"],
                            override,
                            at_least=False,
                        )
                    )
            for failure in engine["failures"]:
                if override is None or not failure["gate"].endswith("log_probability_difference"):
                    limit_name = "--max_log_probability_difference" if "log_prob" in failure["gate"] else "its limit"
                    value = None if failure["value"] is None else float(failure["value"])
                    gates.append(
                        Gate(
                            limit_name,
                            f"{engine['name']} {failure['gate']}",
                            value,
                            float(failure["limit"]),
                            at_least="log_prob" not in failure["gate"],
                        )
                    )
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
            name="register",
            script="model_registry.py",
            paths=paths,
            settings=["--registry_uri", options.registry_uri, "--name", options.name, "--copy", str(options.copy)],
            command_words=("register",),
            inputs=lambda hashes: {
                **self.model_inputs(hashes),
                **{path.name: content_hash(hash_folder(path, hashes)) for path in folders.values()},
                **{kind: content_hash(hash_folder(path, hashes)) for kind, path in self.exports.items()},
            },
            outputs=[place],
            after=[*self.model_steps(), "evaluate", *(["parity"] if self.exports else [])],
            lost=lambda hashes: self.lost_version(place, hashes),
        )

    def lost_version(self, place: Path, hashes: FileHashes) -> str | None:
        """Say why the registry no longer has what was registered."""
        from pokegemma.release.registry import Registry

        version = str(read_json(place)["version"])
        try:
            registry = Registry(self.options.registry_uri, self.options.name)
            content, missing = registry.describe(version)["content_sha256"], registry.missing_parts(version)
        except PokegemmaError as error:
            return str(error)
        if content != content_hash(hash_folder(self.model, hashes)):  # the registry was begun anew
            return f"version {version} is another model now"
        gone = [part for part in ("model", *self.exports) if part in missing]
        return f"version {version} names a place where its {' and '.join(gone)} no longer is" if gone else None


def _without_paths(value: Any) -> Any:
    """Leave absolute paths out: where a thing lies does not change what it is."""
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value


def hash_adapter(folder: Path, hashes: FileHashes) -> str:
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
    return content_hash(hash_folder(Path(base), hashes)) if base and Path(base).is_dir() else hash_of(base)


def _hash_samples(path: Path, hashes: FileHashes, *, limit: int | None = None) -> str:
    """Hash the first `limit` samples of a JSONL file with their pictures."""
    samples: list[Sample] = list(islice(read_samples(path), limit))
    names = {name for sample in samples for name in (*sample.frames, sample.image) if name}
    there = sorted(name for name in names if (path.parent / name).is_file())
    return hash_of([[sample.to_json() for sample in samples], {name: hashes.of(path.parent / name) for name in there}])
