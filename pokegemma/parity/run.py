"""Run a comparison: the reference, what its own rounding costs, then every engine and server."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pokegemma.data.samples import read_samples
from pokegemma.evaluation.view import View
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.families import require_exact
from pokegemma.gemma.image_attention import trained_attention
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.parity.compare import choose_examples, compare, find_worst, summarize_engine
from pokegemma.parity.engine_spec import EngineFailedError, EngineSpec, check_loaded
from pokegemma.parity.limits import ParityLimits, difference_limit, find_failures
from pokegemma.parity.remote import ask_server, choose_model
from pokegemma.parity.resume import FinishedEngines
from pokegemma.parity.task import Measured, Task, context_for
from pokegemma.parity.worker import measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. `url` is without /v1; `model` None: the first that it lists."""

    url: str
    model: str | None = None
    api_key: str | None = None


@dataclass
class Comparison:
    """What every engine is asked, and the reference's answers after `ask_reference`.

    `timeout_s`: limit for one answer; an engine's first answer includes loading its model.
    """

    reference: EngineSpec
    task: Task
    limits: ParityLimits
    tokenizer: Any
    image_attention: str
    timeout_s: float
    finished: FinishedEngines
    reference_answers: Measured | None = field(default=None, init=False)
    causal_answers: Measured | None = field(default=None, init=False)  # of the reference, causal inside pictures

    @classmethod
    def prepare(
        cls,
        reference: EngineSpec,
        held_out: Path,
        view: View,
        *,
        limits: ParityLimits,
        num_samples: int,
        max_new_tokens: int,
        timeout_s: float,
        finished: FinishedEngines,
    ) -> "Comparison":
        """Choose the decisions and read config and tokenizer, not the weights.

        Raises:
            PokegemmaError: the reference is not a Gemma 3 checkpoint, or is an adapter; or samples cannot be read.
        """
        checkpoint = open_checkpoint(reference.path)
        config, tokenizer = checkpoint.config, checkpoint.processor.tokenizer
        require_exact(config, "--model_path")
        tokens = ButtonTokens.of(tokenizer)
        task = Task(
            examples=choose_examples(list(read_samples(held_out)), view, count=num_samples),
            layout=view.layout,
            dataset_folder=held_out.parent,
            size_px=config.vision_config.image_size,
            prefix=tokens.prefix,
            branches=tokens.branches,
            max_new_tokens=max_new_tokens,
        )
        task.question(0)  # a mistake in dataset or layout shows before a model is loaded
        return cls(reference, task, limits, tokenizer, trained_attention(config), timeout_s, finished)

    def ask(self, spec: EngineSpec) -> Measured:
        """Ask an engine, with a progress bar, unless it was asked before the comparison was interrupted."""
        return self.finished.reuse_or_ask(
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
        """Ask the reference; its answers are what the others are to read."""
        self.reference_answers = self.ask(self.reference)
        answers = tuple(reading.tokens for reading in self.reference_answers.readings)
        num_context = context_for(self.task, self.reference_answers)
        self.task = replace(self.task, answers=answers, num_context=num_context)
        return {
            "name": self.reference.name,
            "path": str(self.reference.path),
            "dtype": self.reference.dtype,
            "image_attention": self.image_attention,
            "file_bytes": _file_bytes(self.reference),
            **summarize_engine(self.reference_answers, self.task.examples),
        }

    def ask_variant(self, name: str, **changes: Any) -> tuple[Measured, dict[str, Any]]:
        """Ask the reference with `changes` to its spec, and compare it with the reference."""
        measured = self.ask(replace(self.reference, name=name, **changes))
        return measured, {"name": name, **self._compare(measured)}

    def check(self, spec: EngineSpec, *, limit: float | None) -> dict[str, Any]:
        """Ask an engine, and compare it with the reference and the limits."""
        facts = {
            "name": spec.name,
            "kind": spec.kind,
            "path": str(spec.path),
            "mmproj": spec.mmproj and str(spec.mmproj),
            "file_bytes": _file_bytes(spec),
        }

        def ask() -> Measured:
            measured = self.ask(spec)
            check_loaded(spec, engine=measured.engine or "", weights=measured.weights or "")
            return measured

        return self._check(facts, ask, limit=limit)

    def check_server(self, server: Server) -> dict[str, Any]:
        """Ask a server, and compare what it reports with the reference and the limits."""
        texts = [
            [self.tokenizer.decode(answer[:end], skip_special_tokens=True) for end in range(1, len(answer) + 1)]
            for answer in self.task.answers or ()
        ]
        name = f"server {server.url}"
        facts = {"name": name, "kind": "server", "path": server.url, "mmproj": None, "file_bytes": None}
        options = {"timeout_s": self.timeout_s, "api_key": server.api_key}

        def ask() -> Measured:
            model = choose_model(server.url, model=server.model, **options)
            facts["name"] = f"server {model}"
            return self._with_bar(
                facts["name"],
                lambda advance: ask_server(
                    server.url, self.task, model=model, texts=texts, on_reading=advance, **options
                ),
            )

        return self._check(facts, ask, limit=self.limits.max_difference)

    def _compare(self, measured: Measured) -> dict[str, Any]:
        return {**summarize_engine(measured, self.task.examples), **compare(self.reference_answers, measured)}

    def _check(self, facts: dict[str, Any], ask: Callable[[], Measured], *, limit: float | None) -> dict[str, Any]:
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
            **self._compare(measured),
            "max_log_probability_difference": limit,
        }
        failures = find_failures(
            record,
            self.reference_answers,
            measured,
            limits=replace(self.limits, max_difference=limit),
            reference_rate=summarize_engine(self.reference_answers, self.task.examples)["valid_json_rate"],
            examples=self.task.examples,
        )
        if self.causal_answers is not None and facts["kind"] == "mlx":
            record["against_causal_reference"] = compare(self.causal_answers, measured)
        worst = find_worst(self.reference_answers, measured, self.task.examples)
        return {**record, "passed": not failures, "failures": failures, "worst": worst}


def run_comparison(comparison: Comparison, specs: Sequence[EngineSpec], servers: Sequence[Server]) -> dict[str, Any]:
    """Return the result as parity.json contains it.

    Raises:
        PokegemmaError: the reference cannot answer, or the type of an engine's weights has no limit.
    """
    given, dtype = comparison.limits.max_difference, comparison.reference.dtype
    if given is None:
        for spec in specs:
            difference_limit(spec, rounding=0.0)  # raises before anything has run
    reference = comparison.ask_reference()
    variants, rounding = [], None
    if specs and given is None:
        other = "float32" if dtype == "bfloat16" else "bfloat16"
        _, variant = comparison.ask_variant(f"reference in {other}", dtype=other)
        rounding = variant["button_log_probability_difference"]["mean"]
        variants.append(variant)
    if comparison.image_attention != "causal" and any(spec.kind == "mlx" for spec in specs):
        name = "reference, causal pictures"
        comparison.causal_answers, variant = comparison.ask_variant(name, image_attention="causal")
        variants.append(variant)
    engines = []
    for spec in specs:
        limit = given
        if rounding is not None:
            limit = difference_limit(spec, rounding=rounding, reference_dtype=dtype)
        engines.append(comparison.check(spec, limit=limit))
    engines += [comparison.check_server(server) for server in servers]
    return {
        "passed": all(engine["passed"] for engine in engines),
        "num_samples": len(comparison.task.examples),
        "layout": comparison.task.layout,
        "gates": asdict(comparison.limits),
        "rounding": rounding,
        "reference": reference,
        "variants": variants,
        "engines": engines,
    }


def _file_bytes(spec: EngineSpec) -> int:
    return sum(file.stat().st_size for file in spec.files if file.is_file())
