"""Run a comparison: the reference, what its own rounding costs, then every engine and server."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.view import View
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.families import require_exact
from pokegemma.gemma.image_attention import image_attention
from pokegemma.gemma.loading import load_config, load_processor
from pokegemma.parity import compare
from pokegemma.parity.compare import Gates
from pokegemma.parity.remote import ask_server, choose_model
from pokegemma.parity.resume import FinishedEngines
from pokegemma.parity.worker import EngineFailedError, EngineSpec, Measured, Task, context_for, measure

logger = logging.getLogger(__name__)

MMPROJ_FILE = "mmproj-f16.gguf"


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. `url` is without /v1; `model` None: the first that it lists."""

    url: str
    model: str | None = None
    api_key: str | None = None


def find_engines(
    *,
    gguf: Sequence[str] = (),
    mmproj: str | None = None,
    mlx: Sequence[str] = (),
    transformers: Sequence[str] = (),
    device: str | None = None,
) -> list[EngineSpec]:
    """Return what to compare: every model-*.gguf of a folder, single GGUF files, MLX folders and checkpoints.

    Raises:
        PokegemmaError: one is not there, or a folder holds none.
    """
    specs = []
    for path in map(Path, gguf):
        files = sorted(path.glob("model-*.gguf")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise PokegemmaError(f"--gguf {path}: " + ("no model-*.gguf in it" if path.is_dir() else "no such file"))
        for file in files:
            beside = Path(mmproj) if mmproj else file.parent / MMPROJ_FILE
            specs.append(EngineSpec("llama.cpp", f"llama.cpp {file.stem.removeprefix('model-')}", file, mmproj=beside))
    for flag, kind, paths in (("--mlx", "mlx", mlx), ("--transformers", "transformers", transformers)):
        for path in map(Path, paths):
            if not (path / "config.json").is_file():
                raise PokegemmaError(f"{flag} {path}: no checkpoint (config.json not found)")
            specs.append(EngineSpec(kind, f"{kind} {path.resolve().name}", path, device=device))
    names = [spec.name for spec in specs]
    return [spec if names.count(spec.name) == 1 else replace(spec, name=f"{spec.name} ({spec.path})") for spec in specs]


@dataclass
class Comparison:
    """All that is asked, and the reference's answers once `ask_reference` has them.

    `timeout_s`: what an engine or server may take for one answer, an engine for the first with loading its model.
    """

    reference: EngineSpec
    task: Task
    gates: Gates
    tokenizer: Any
    image_attention: str
    timeout_s: float
    finished: FinishedEngines

    def __post_init__(self) -> None:
        self.said: Measured | None = None
        self.causal: Measured | None = None

    @classmethod
    def prepare(
        cls,
        reference: EngineSpec,
        held_out: Path,
        view: View,
        *,
        gates: Gates,
        num_samples: int,
        max_new_tokens: int,
        timeout_s: float,
        finished: FinishedEngines,
    ) -> "Comparison":
        """Choose decisions and read what they are asked with: config and tokenizer, not the weights.

        Raises:
            PokegemmaError: the reference is no Gemma 3 checkpoint, or an adapter; or the samples cannot be read.
        """
        if (reference.path / "adapter_config.json").is_file():
            raise PokegemmaError(
                f"{reference.path} is an adapter; merge it first: scripts/merge_qlora.py --lora_path {reference.path}"
            )
        config = load_config(reference.path)
        require_exact(config, "--model_path")
        tokenizer = load_processor(reference.path).tokenizer
        tokens = ButtonTokens.of(tokenizer)
        examples = compare.choose_examples(list(read_samples(held_out)), view, count=num_samples)
        task = Task(
            examples=examples,
            layout=view.layout,
            dataset_folder=held_out.parent,
            size_px=config.vision_config.image_size,
            prefix=tokens.prefix,
            branches=tokens.branches,
            max_new_tokens=max_new_tokens,
        )
        task.question(0)  # a mistake in dataset or layout shows before a model is loaded
        return cls(reference, task, gates, tokenizer, image_attention(config), timeout_s, finished)

    def ask(self, spec: EngineSpec) -> Measured:
        """Ask an engine, with a progress bar, unless it has been asked before the comparison was interrupted."""
        return self.finished.take_or_keep(
            spec,
            self.task,
            lambda: self._with_bar(
                spec.name, lambda advance: measure(spec, self.task, timeout_s=self.timeout_s, on_reading=advance)
            ),
        )

    def _with_bar(self, name: str, ask: Callable[[Callable[[], None]], Measured]) -> Measured:
        with tqdm(total=len(self.task.examples), desc=name, unit="decision") as bar:
            return ask(lambda: bar.update() and None)

    def ask_reference(self) -> dict[str, Any]:
        """Ask the reference; what the others are to read are its answers."""
        self.said = self.ask(self.reference)
        answers = tuple(reading.tokens for reading in self.said.readings)
        self.task = replace(self.task, answers=answers, num_context=context_for(self.task, self.said))
        return {
            "name": self.reference.name,
            "path": str(self.reference.path),
            "dtype": self.reference.dtype,
            "image_attention": self.image_attention,
            "file_bytes": _size(self.reference),
            **compare.describe(self.said, self.task.examples),
        }

    def ask_variant(self, name: str, **changes: Any) -> tuple[Measured, dict[str, Any]]:
        """Ask the reference with something changed, and compare it with the reference."""
        said = self.ask(replace(self.reference, name=name, **changes))
        return said, {"name": name, **compare.describe(said, self.task.examples), **compare.compare(self.said, said)}

    def check(self, spec: EngineSpec, *, limit: float | None) -> dict[str, Any]:
        """Ask an engine, compare and judge it."""
        facts = {
            "name": spec.name,
            "kind": spec.kind,
            "path": str(spec.path),
            "mmproj": spec.mmproj and str(spec.mmproj),
            "file_bytes": _size(spec),
        }

        def ask() -> Measured:
            measured = self.ask(spec)
            compare.check_loaded(spec, engine=measured.engine or "", weights=measured.weights or "")
            return measured

        return self._judge(facts, ask, limit=limit)

    def check_server(self, server: Server) -> dict[str, Any]:
        """Ask a server, compare and judge it by what it tells."""
        decode = self.tokenizer.decode
        texts = [
            [decode(answer[:end], skip_special_tokens=True) for end in range(1, len(answer) + 1)]
            for answer in self.task.answers or ()
        ]
        facts = {
            "name": f"server {server.url}",
            "kind": "server",
            "path": server.url,
            "mmproj": None,
            "file_bytes": None,
        }

        def ask() -> Measured:
            model = choose_model(server.url, model=server.model, timeout_s=self.timeout_s, api_key=server.api_key)
            facts["name"] = f"server {model}"
            options = {"model": model, "timeout_s": self.timeout_s, "api_key": server.api_key}
            return self._with_bar(
                facts["name"],
                lambda advance: ask_server(server.url, self.task, texts=texts, on_reading=advance, **options),
            )

        return self._judge(facts, ask, limit=self.gates.max_difference)

    def _judge(self, facts: dict[str, Any], ask: Callable[[], Measured], *, limit: float | None) -> dict[str, Any]:
        try:
            measured = ask()
        except EngineFailedError as error:
            failure = {"gate": "runs", "value": None, "limit": None, "sample": None, "message": str(error)}
            logger.warning("%s failed: %s", facts["name"], error)
            return {**facts, "passed": False, "failures": [failure]}
        record = {
            **facts,
            "engine": measured.engine,
            "weights": measured.weights,
            **compare.describe(measured, self.task.examples),
            **compare.compare(self.said, measured),
            "max_log_probability_difference": limit,
        }
        reference_rate = compare.describe(self.said, self.task.examples)["valid_json_rate"]
        failures = compare.judge(
            record,
            self.said,
            measured,
            gates=replace(self.gates, max_difference=limit),
            reference_rate=reference_rate,
            examples=self.task.examples,
        )
        if self.causal is not None and facts["kind"] == "mlx":
            record["against_causal_reference"] = compare.compare(self.causal, measured)
        worst = compare.find_worst(self.said, measured, self.task.examples)
        return {**record, "passed": not failures, "failures": failures, "worst": worst}


def run_comparison(comparison: Comparison, specs: Sequence[EngineSpec], servers: Sequence[Server]) -> dict[str, Any]:
    """Return the whole result, ready for JSON.

    Raises:
        PokegemmaError: the reference cannot answer, or there is no limit for an engine's type of weights.
    """
    given, dtype = comparison.gates.max_difference, comparison.reference.dtype
    if given is None:
        for spec in specs:
            compare.limit_of(spec, rounding=0.0)  # raises before anything has run
    reference = comparison.ask_reference()
    variants, rounding = [], None
    if specs and given is None:
        other = "float32" if dtype == "bfloat16" else "bfloat16"
        _, variant = comparison.ask_variant(f"reference in {other}", dtype=other)
        rounding = variant["button_log_probability_difference"]["mean"]
        variants.append(variant)
    if comparison.image_attention != "causal" and any(spec.kind == "mlx" for spec in specs):
        name = "reference, causal pictures"
        comparison.causal, variant = comparison.ask_variant(name, image_attention="causal")
        variants.append(variant)
    engines = []
    for spec in specs:
        limit = given
        if rounding is not None:
            limit = compare.limit_of(spec, rounding=rounding, reference_dtype=dtype)
        engines.append(comparison.check(spec, limit=limit))
    engines += [comparison.check_server(server) for server in servers]
    return {
        "passed": all(engine["passed"] for engine in engines),
        "num_samples": len(comparison.task.examples),
        "layout": comparison.task.layout,
        "gates": asdict(comparison.gates),
        "rounding": rounding,
        "reference": reference,
        "variants": variants,
        "engines": engines,
    }


def _size(spec: EngineSpec) -> int:
    return sum(file.stat().st_size for file in spec.files if file.is_file())
