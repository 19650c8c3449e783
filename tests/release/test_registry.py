"""Versions in MLflow's registry: complete, found again, promoted, rolled back and exported as they were registered."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.evaluation import metrics, report
from pokegemma.evaluation.predict import Predictions
from pokegemma.fingerprints import FileHashes, content_hash, hash_folder
from pokegemma.provenance import PROJECT_ROOT, write_run_record
from pokegemma.release import version_tables
from scripts import model_registry
from tests.processes import WAIT_S, wait_until
from tests.release import registry_process

Registry = pytest.importorskip("pokegemma.release.registry", exc_type=PokegemmaError).Registry
registration = pytest.importorskip("pokegemma.release.registration", exc_type=ImportError)

NUM_SESSIONS = 6
TRUTH = np.arange(12 * NUM_SESSIONS) % 8


@pytest.fixture
def registry(empty_registry: Path, tmp_path: Path) -> Any:
    (tmp_path / "registry").mkdir()
    return Registry(str(shutil.copy(empty_registry, tmp_path / "registry" / "registry.db")), "pokegemma")


def write_model(folder: Path, weights: str = "weights", *, dataset: str = "d" * 64) -> Path:
    """Write what a merged checkpoint consists of, with weights that are a word."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gemma3"}')
    (folder / "processor_config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    training = {"stage": "train", "dataset": {"sha256": dataset}, "git_commit": "c0ffee", "options": {"lora_r": 16}}
    write_run_record(folder, stage="merge", options={}, training=training)
    return folder


def write_evaluation(folder: Path, model: Path, *, num_wrong: int, dataset: str = "e" * 64) -> Path:
    """Write a report about a model that errs in the first `num_wrong` decisions, as scripts/evaluate.py does."""
    folder.mkdir(parents=True)
    sessions = tuple(f"s{number % NUM_SESSIONS}" for number in range(len(TRUTH)))
    decisions = metrics.Decisions(TRUTH, np.roll(TRUTH, 1), sessions, sessions)
    answers = np.where(np.arange(len(TRUTH)) < num_wrong, (TRUTH + 1) % 8, TRUTH)
    scores = np.full((len(TRUTH), 8), 0.01)
    scores[np.arange(len(TRUTH)), answers] = 0.93
    fitted = metrics.Decisions(TRUTH[:8], TRUTH[:8], sessions[:8], sessions[:8])
    result = report.build_metrics(decisions, fitted, Predictions(None, scores, {"scored": [0.01]}))
    lines = [
        {
            "id": f"{session}/{number}",
            "truth": BUTTONS[TRUTH[number]],
            "text": None,
            "button": None,
            "scored_button": BUTTONS[answers[number]],
        }
        for number, session in enumerate(sessions)
    ]
    report.write_report(folder, result, lines, "<html></html>")
    write_run_record(folder, stage="evaluate", options={"model_path": str(model)}, dataset_hash=dataset)
    return folder


def write_parity(folder: Path, model: Path, *, passed: bool) -> Path:
    folder.mkdir(parents=True)
    engine = {
        "name": "model-f16.gguf",
        "passed": passed,
        "button_agreement": 1.0 if passed else 0.4,
        "failures": [] if passed else [{"gate": "button_agreement", "message": "0.4 is below 0.98"}],
    }
    (folder / "parity.json").write_text(json.dumps({"passed": passed, "num_samples": 50, "engines": [engine]}))
    write_run_record(folder, stage="parity", options={"model_path": str(model)})
    return folder


@pytest.fixture
def add(registry: Any, tmp_path: Path) -> Callable[..., int]:
    """Return a function that registers a made-up model of a name, with its results, and returns the version."""

    def add_model(name: str, *, num_wrong: int = 7, parity: bool = True, evaluated_on: str = "e" * 64) -> int:
        model = write_model(tmp_path / name, weights=name)
        evaluation = write_evaluation(tmp_path / f"{name}_eval", model, num_wrong=num_wrong, dataset=evaluated_on)
        compared = write_parity(tmp_path / f"{name}_parity", model, passed=parity)
        return registry.register(model, evaluation=evaluation, parity=compared).version

    return add_model


def test_a_version_has_its_origin_data_and_results(registry: Any, add: Callable[..., int], tmp_path: Path) -> None:
    assert add("one") == 1
    described = registry.describe("1")
    files = hash_folder(tmp_path / "one", FileHashes())
    assert set(files) == {"config.json", "processor_config.json", "model.safetensors"}
    assert described["content_sha256"] == content_hash(files)
    assert described["dataset_sha256"] == "d" * 64
    assert described["evaluation"]["accuracy"] == 65 / 72
    assert described["evaluation"]["dataset_sha256"] == "e" * 64
    assert described["parity"]["engines"][0]["button_agreement"] == 1.0
    for name in ("run.json", "evaluation/metrics.json", "evaluation/report.html", "parity/parity.json"):
        folder = tmp_path / "one" if name == "run.json" else tmp_path / f"one_{name[:4].rstrip('i')}"
        folder = tmp_path / "one_parity" if name.startswith("parity") else folder
        fetched = registry.fetch("1", name, tmp_path)
        assert fetched is not None
        assert fetched.read_bytes() == (folder / Path(name).name).read_bytes()
    assert registry.fetch("1", "evaluation/nothing.json", tmp_path) is None


def test_registering_the_same_content_twice_returns_the_first_version(
    registry: Any, add: Callable[..., int], tmp_path: Path
) -> None:
    add("one")
    again = registry.register(write_model(tmp_path / "elsewhere", weights="one"))  # a new run.json, the same weights
    assert (again.version, again.created, again.updated) == (1, False, ())
    assert len(registry.versions()) == 1
    assert registry.describe("1")["evaluation"] is not None  # what it had is not taken away


def test_new_results_of_known_content_replace_the_old(registry: Any, add: Callable[..., int], tmp_path: Path) -> None:
    add("one", parity=False)
    model = tmp_path / "one"
    again = registry.register(model, parity=write_parity(tmp_path / "again", model, passed=True))
    assert (again.version, again.created, again.updated) == (1, False, ("parity",))
    assert registry.describe("1")["parity"]["passed"]
    fetched = registry.fetch("1", "parity/parity.json", tmp_path)
    assert json.loads(fetched.read_text())["passed"]


def write_gguf(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-f16.gguf").write_text(text)
    return folder


@pytest.mark.parametrize("copy", [False, True])
def test_exports_of_known_content_are_registered(copy: bool, registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    registry.register(model, copy=copy)
    gguf = write_gguf(tmp_path / "gguf", "first")
    assert registry.register(model, exports=[gguf]).refiled == ("gguf",)
    assert registry.register(model, exports=[gguf]).refiled == ()
    write_gguf(gguf, "second")  # as another converter makes it
    again = registry.register(model, exports=[gguf])
    assert (again.version, again.created, again.refiled) == (1, False, ("gguf",))
    registry.export("1", tmp_path / "out", part="gguf")
    assert (tmp_path / "out" / "model-f16.gguf").read_text() == "second"
    if copy:
        shutil.rmtree(gguf)
        registry.export("1", tmp_path / "out", part="gguf", overwrite=True)


def test_files_that_were_moved_are_found_again_when_registered_again(registry: Any, tmp_path: Path) -> None:
    registry.register(write_model(tmp_path / "old"))
    assert registry.missing_parts("1") == []
    (tmp_path / "old").rename(tmp_path / "new")
    assert registry.missing_parts("1") == ["model"]
    again = registry.register(tmp_path / "new")
    assert (again.version, again.created, again.refiled) == (1, False, ("model",))
    assert registry.describe("1")["model_path"] == str(tmp_path / "new")
    registry.export("1", tmp_path / "out")
    shutil.copytree(tmp_path / "new", tmp_path / "twin")
    assert registry.register(tmp_path / "twin").refiled == ()  # those of before are still there


def test_known_content_is_copied_when_that_is_asked_for(registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    registry.register(model)
    assert registry.register(model, copy=True).refiled == ("model",)
    assert registry.register(model, copy=True).refiled == ()
    shutil.rmtree(model)
    registry.export("1", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "weights"


def test_a_copied_version_is_exported_to_a_relative_path(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(write_model(tmp_path / "model"), copy=True)
    monkeypatch.chdir(tmp_path)
    registry.export("1", Path("outputs/served"))
    assert not list(Path("outputs/served").glob(".*"))
    assert hash_folder(Path("outputs/served"), FileHashes()) == hash_folder(tmp_path / "model", FileHashes())


def test_a_part_that_was_never_copied_does_not_count_as_copied(registry: Any, tmp_path: Path) -> None:
    model, gguf = write_model(tmp_path / "model"), write_gguf(tmp_path / "gguf", "gguf")
    registry.register(model, exports=[gguf])
    assert registry.register(model, copy=True).refiled == ("model",)  # of the export nothing was said
    shutil.rmtree(gguf)
    assert registry.missing_parts("1") == ["gguf"]
    assert registry.register(model, exports=[write_gguf(tmp_path / "new" / "gguf", "gguf")]).refiled == ("gguf",)
    shutil.rmtree(tmp_path / "new")
    registry.export("1", tmp_path / "out", part="gguf")


def test_a_disk_that_refuses_a_copy_is_one_line(registry: Any, tmp_path: Path) -> None:
    (tmp_path / "registry" / "artifacts").touch()  # where a folder should be
    with pytest.raises(PokegemmaError, match=r"^registry sqlite:.*artifacts"):
        registry.register(write_model(tmp_path / "model"), copy=True)
    assert (registry.versions(), runs_of(registry)) == ([], {})


def test_new_results_bring_the_new_card(registry: Any, add: Callable[..., int], tmp_path: Path) -> None:
    model = tmp_path / "one"
    add("one", parity=False)
    (model / "README.md").write_text("parity passed")
    registry.register(model, parity=write_parity(tmp_path / "again", model, passed=True))
    assert registry.fetch("1", "README.md", tmp_path / "one").read_text() == "parity passed"


def test_results_that_were_moved_with_their_model_are_taken(registry: Any, tmp_path: Path) -> None:
    model, old, new = write_model(tmp_path / "old" / "merged"), tmp_path / "old", tmp_path / "new"
    write_evaluation(old / "evaluation", model, num_wrong=0)
    facts = {"model_path": str(model), "output_dir": str(old / "evaluation")}
    write_run_record(old / "evaluation", stage="evaluate", options=facts, dataset_hash="e" * 64)
    old.rename(new)
    assert registry.register(new / "merged", evaluation=new / "evaluation").created
    write_model(new / "other", "other")
    with pytest.raises(PokegemmaError, match="is about the model"):
        registry.register(new / "other", evaluation=new / "evaluation")


def test_an_engine_that_did_not_run_is_a_failure_of_parity(registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    parity = write_parity(tmp_path / "parity", model, passed=False)
    failure = {"gate": "runs", "value": None, "limit": None, "sample": None, "message": "no answer within 9 s"}
    died = {"name": "mlx", "kind": "mlx", "path": "mlx", "passed": False, "failures": [failure]}
    (parity / "parity.json").write_text(json.dumps({"passed": False, "num_samples": 50, "engines": [died]}))
    registry.register(model, parity=parity)
    assert registry.describe("1")["failed"] == {"parity": "parity failed (mlx)"}
    described = registry.describe("1")
    (row,) = [
        row for row in version_tables.compare_versions(described, described)["rows"] if row["key"] == "parity/mlx"
    ]
    assert (row["values"], row["difference"]) == ([None, None], None)


def test_results_of_another_model_are_refused(registry: Any, tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one", "1"), write_model(tmp_path / "two", "2")
    evaluation = write_evaluation(tmp_path / "evaluation", one, num_wrong=0)
    with pytest.raises(PokegemmaError, match="is about the model"):
        registry.register(two, evaluation=evaluation)
    record = json.loads((one / "run.json").read_text())
    (one / "run.json").write_text(json.dumps({**record, "created": "2099-01-01T00:00:00+0000"}))
    with pytest.raises(PokegemmaError, match="is older than the model"):
        registry.register(one, evaluation=evaluation)
    assert registry.versions() == []


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "run.json"])
def test_an_incomplete_model_is_refused(gone: str, registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / gone).unlink()
    with pytest.raises(PokegemmaError, match=r"no model|run\.json not found"):
        registry.register(model)
    assert registry.versions() == []


def test_promoting_what_does_not_exist_is_an_error(registry: Any, add: Callable[..., int]) -> None:
    with pytest.raises(PokegemmaError, match=r"no version '1'; it has none"):
        registry.promote("1", "champion")
    add("one")
    for spec in ("2", "champion", "v1"):
        with pytest.raises(PokegemmaError, match="it has 1"):
            registry.promote(spec, "champion")
    for alias in ("7", "a b", ""):
        with pytest.raises(PokegemmaError, match=r"^--alias "):
            registry.promote("1", alias)
    assert registry.describe("1")["aliases"] == []


def test_a_version_whose_results_failed_is_promoted_only_by_force(registry: Any, add: Callable[..., int]) -> None:
    add("unlike", parity=False)
    add("unable", num_wrong=70)
    with pytest.raises(CheckFailedError, match=r"parity failed \(model-f16\.gguf\)"):
        registry.promote("1", "champion")
    with pytest.raises(CheckFailedError, match=r"accuracy of 2\.8 % is not above the \w+ baseline"):
        registry.promote("2", "champion")
    assert registry.promote("1", "champion", force=True) == (1, None)


def test_results_that_fail_later_move_no_alias_and_are_reported(
    registry: Any, add: Callable[..., int], tmp_path: Path
) -> None:
    add("one")
    add("two")
    registry.promote("1", "champion")
    assert registry.describe("champion")["failed"] == {}
    model = tmp_path / "one"
    registry.register(model, parity=write_parity(tmp_path / "later", model, passed=False))
    described = registry.describe("champion")
    assert (described["version"], described["failed"]) == (1, {"parity": "parity failed (model-f16.gguf)"})
    with pytest.raises(CheckFailedError, match="version 1 is not promoted: parity failed"):
        registry.promote("champion", "stable")
    compared = version_tables.compare_versions(registry.describe("1"), registry.describe("2"))
    assert compared["warnings"] == ["version 1: parity failed (model-f16.gguf)"]
    registry.promote("2", "champion")
    assert registry.rollback("champion") == (1, 2)  # where one comes from is always open


def test_latest_is_the_last_version_and_no_alias(registry: Any, add: Callable[..., int]) -> None:
    add("one")
    assert registry.describe("latest")["version"] == 1
    add("two")
    assert registry.promote("latest", "champion") == (2, None)
    with pytest.raises(PokegemmaError, match="latest"):
        registry.promote("1", "latest")


def test_rollback_returns_an_alias_to_the_version_before(registry: Any, add: Callable[..., int]) -> None:
    for name in ("one", "two", "three"):
        add(name)
    assert [registry.promote(spec, "champion") for spec in "123"] == [(1, None), (2, 1), (3, 2)]
    assert registry.promote("champion", "champion") == (3, 3)  # no change, nothing to go back to
    assert registry.rollback("champion") == (2, 3)
    assert registry.rollback("champion") == (1, 2)
    with pytest.raises(PokegemmaError, match=r"^champion is version 1 "):
        registry.rollback("champion")
    assert registry.describe("champion")["version"] == 1
    with pytest.raises(PokegemmaError, match="no version 'challenger'"):
        registry.rollback("challenger")


def test_rollback_after_a_promotion_that_died_halfway(registry: Any, add: Callable[..., int]) -> None:
    for name in ("one", "two"):
        add(name)
    registry.promote("1", "champion")
    registry.promote("2", "champion")
    # What promote writes first: the version that the alias is about to leave.
    registry.client.set_registered_model_tag("pokegemma", "history.champion", "[1, 2]")
    assert registry.rollback("champion") == (1, 2)


def test_comparison_shows_differences_and_a_paired_interval(
    registry: Any, add: Callable[..., int], tmp_path: Path
) -> None:
    add("one", num_wrong=18)
    add("two", num_wrong=0)
    compared = version_tables.compare_versions(registry.describe("1"), registry.describe("2"))
    rows = {row["key"]: row for row in compared["rows"]}
    assert rows["accuracy"]["values"] == [0.75, 1.0]
    assert rows["accuracy"]["difference"] == 0.25
    assert rows["parity/model-f16.gguf"]["difference"] == 0.0
    assert compared["warnings"] == []
    first, second = ((tmp_path / f"{name}_eval" / "predictions.jsonl").read_text() for name in ("one", "two"))
    bounds = version_tables.paired_interval(first, second)
    assert bounds is not None
    assert 0 < bounds[0] <= 0.25 <= bounds[1] < 0.5
    assert version_tables.paired_interval(first, second.partition("\n")[2]) is None  # other decisions
    assert "+0.2500" in version_tables.format_comparison(compared)


def test_comparison_warns_where_the_data_differ(registry: Any, add: Callable[..., int], tmp_path: Path) -> None:
    add("one")
    add("two", evaluated_on="f" * 64)
    registry.register(write_model(tmp_path / "three", "three", dataset="0" * 64))
    one, two, three = (registry.describe(spec) for spec in "123")
    assert version_tables.compare_versions(one, two)["warnings"] == [
        "evaluated on different data: their figures do not compare"
    ]
    assert version_tables.compare_versions(one, three)["warnings"] == [
        "version 3 has no evaluation",
        "trained on different data",
    ]


def test_export_writes_what_was_registered(registry: Any, add: Callable[..., int], tmp_path: Path) -> None:
    add("one")
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-f16.gguf").write_text("gguf")
    registry.register(write_model(tmp_path / "two", "two"), exports=[gguf])
    registry.promote("2", "champion")
    assert registry.export("1", tmp_path / "out") == 1
    assert hash_folder(tmp_path / "out", FileHashes()) == hash_folder(tmp_path / "one", FileHashes())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["stage"], record["options"]["version"]) == ("export", 1)
    assert record["training"]["options"] == {"lora_r": 16}  # what evaluation reads
    assert registry.export("champion", tmp_path / "part", part="gguf") == 2
    assert (tmp_path / "part" / "model-f16.gguf").read_text() == "gguf"
    with pytest.raises(PokegemmaError, match="exists"):
        registry.export("1", tmp_path / "out")
    registry.export("2", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "two"
    with pytest.raises(PokegemmaError, match=r"^--part gguf: version 1 has model"):
        registry.export("1", tmp_path / "other", part="gguf")
    with pytest.raises(PokegemmaError, match="--output_dir"):
        registry.export("1", tmp_path / "one", overwrite=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "model.safetensors").write_text("onE"), r"changed: model\.safetensors"),
        (lambda model: (model / "config.json").unlink(), r"1 of 3 registered files are missing \(config\.json"),
        (shutil.rmtree, "3 of 3 registered files are missing"),
    ],
)
def test_export_of_files_that_changed_fails_and_leaves_nothing(
    damage: Callable[[Path], Any], message: str, registry: Any, add: Callable[..., int], tmp_path: Path
) -> None:
    add("one")
    damage(tmp_path / "one")
    with pytest.raises(CheckFailedError, match=rf"^{tmp_path}/one\b.*{message}"):
        registry.export("1", tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_copy_survives_its_original(registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    expected = hash_folder(model, FileHashes())
    registry.register(model, copy=True)
    shutil.rmtree(model)
    registry.export("1", tmp_path / "out")
    assert hash_folder(tmp_path / "out", FileHashes()) == expected
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*expected, "run.json"}


def test_a_registration_that_fails_leaves_no_version_and_no_copy(registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(PokegemmaError, match=r"registry sqlite:.*exceed|registry sqlite:"):
        registry.register(model, copy=True, description="\ud800")  # half a surrogate pair, which no database takes
    assert registry.versions() == []
    assert [path for path in tmp_path.rglob("artifacts/*") if path.is_dir()] == []


def run_registry(*words: object, code: str | None = None, cwd: Path = PROJECT_ROOT) -> subprocess.Popen[str]:
    """Start scripts/model_registry.py; `code` runs in its process before."""
    script = PROJECT_ROOT / "scripts" / "model_registry.py"
    command = [sys.executable, str(script)]
    if code:
        command = [sys.executable, "-c", f"{code}\nimport runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", "CI")}
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=cwd,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def register_and_kill(registry: Any, call: str, model: Path, *, at: int = 1) -> None:
    """Register a copy in a process that is killed when it calls a method of MLflow's client for the `at`th time."""
    words = ("register", "--model_path", model, "--registry_uri", registry.file, "--copy")
    output = registry.file.with_name("output")
    hook = (f"mlflow.MlflowClient.{call}", registry_process.kill_at(at))
    with registry_process.started(*words, output=output, hook=hook) as process:
        process.join(WAIT_S)
        assert process.exitcode == -signal.SIGKILL, output.read_text()


def runs_of(registry: Any) -> dict[str, str]:
    """Return the status of every run that was not deleted."""
    experiments = [one.experiment_id for one in registry.client.search_experiments()]
    return {run.info.run_id: run.info.status for run in registry.client.search_runs(experiments)}


@pytest.mark.parametrize("again", ["the same", "another"])
def test_the_next_registration_removes_files_of_a_killed_one(again: str, registry: Any, tmp_path: Path) -> None:
    model, artifacts = write_model(tmp_path / "model"), tmp_path / "registry" / "artifacts"
    register_and_kill(registry, "log_artifact", model, at=5)  # manifest, run.json, two of three files
    (killed,) = artifacts.iterdir()
    assert [path.name for path in sorted(killed.rglob("files/model/*"))] == ["config.json", "model.safetensors"]
    assert (runs_of(registry), registry.versions()) == ({killed.name: "RUNNING"}, [])
    done = registry.register(model if again == "the same" else write_model(tmp_path / "other", "other"), copy=True)
    assert (done.version, done.created) == (1, True)
    (run_id,) = (path.name for path in artifacts.iterdir())
    assert (run_id != killed.name, runs_of(registry)) == (True, {run_id: "FINISHED"})
    assert registry.find("1").run_id == run_id


def test_a_version_whose_register_was_killed_at_the_very_end_is_whole(registry: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    register_and_kill(registry, "set_terminated", model)
    assert list(runs_of(registry).values()) == ["RUNNING"]
    again = registry.register(model, copy=True)
    assert (again.version, again.created, again.refiled) == (1, False, ())
    assert list(runs_of(registry).values()) == ["FINISHED"]
    registry.export("1", tmp_path / "out")


@pytest.mark.parametrize("copy", [False, True])
def test_an_interruption_right_after_the_version_was_made_leaves_it_whole(
    copy: bool, registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the commit, or a server that made the version and whose answer came too late."""
    model, make = write_model(tmp_path / "model"), registry.client.create_model_version

    def make_and_fail(*arguments: Any, **named: Any) -> None:
        make(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.client, "create_model_version", make_and_fail)
    with pytest.raises(KeyboardInterrupt):
        registry.register(model, copy=copy)
    assert list(runs_of(registry).values()) == ["FINISHED"]
    again = registry.register(model, copy=copy)
    assert (again.version, again.created, again.refiled) == (1, False, ())
    assert registry.export("1", tmp_path / "out") == 1


def test_a_move_that_was_interrupted_is_told_by_the_next_registration(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(write_model(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_model_version_tag", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.register(tmp_path / "after")
    assert registry.register(tmp_path / "after").refiled == ("model",)
    assert registry.describe("1")["model_path"] == str(tmp_path / "after")


def test_runs_of_others_are_left_alone(registry: Any, tmp_path: Path) -> None:
    registry.register(write_model(tmp_path / "model"))
    experiment = registry.client.get_experiment_by_name("pokegemma").experiment_id
    theirs = registry.client.create_run(experiment, run_name="pokegemma")  # still training, say
    registry.client.log_text(theirs.info.run_id, "mine", "notes.txt")
    registry.register(write_model(tmp_path / "other", "other"))
    assert runs_of(registry)[theirs.info.run_id] == "RUNNING"
    assert registry.client.list_artifacts(theirs.info.run_id)[0].path == "notes.txt"


def answer_in_pages(registry: Any, monkeypatch: pytest.MonkeyPatch, search: str) -> None:
    """Make MLflow find two at a time, instead of a thousand and more."""
    ask = getattr(registry.client, search)
    monkeypatch.setattr(registry.client, search, lambda *words, **options: ask(*words, **{**options, "max_results": 2}))


def test_versions_beyond_the_first_page_are_listed(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.client.create_registered_model("pokegemma")
    for _ in range(5):
        registry.client.create_model_version("pokegemma", "/model")
    registry.client.set_registered_model_alias("pokegemma", "production", "1")
    answer_in_pages(registry, monkeypatch, "search_model_versions")
    versions = [(one["version"], one["aliases"]) for one in registry.versions()]
    assert versions == [(1, ["production"]), (2, []), (3, []), (4, []), (5, [])]


def test_killed_registrations_beyond_the_first_page_are_removed(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, files = registry.client, tmp_path / "registry" / "artifacts"
    experiment = registration.open_experiment(client, files)
    tags = {registration.MARK: "content"}
    killed = [client.create_run(experiment, tags=tags).info.run_id for _ in range(5)]
    answer_in_pages(registry, monkeypatch, "search_runs")
    registration.open_experiment(client, files)
    assert {registry.client.get_run(run_id).info.lifecycle_stage for run_id in killed} == {"deleted"}


@pytest.mark.slow
def test_a_running_registration_is_waited_for_and_not_removed(registry: Any, tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one", "1"), write_model(tmp_path / "two", "2")
    reached, go, asked = (tmp_path / name for name in ("reached", "go", "asked"))
    words = ("register", "--registry_uri", registry.file, "--copy", "--model_path")
    wait = ("mlflow.MlflowClient.create_model_version", registry_process.wait_for(reached, go))
    with registry_process.started(*words, one, output=tmp_path / "first", hook=wait) as first:
        wait_until(reached.exists)
        lock = ("pokegemma.release.registry.file_lock", registry_process.touch(asked))
        with registry_process.started(*words, two, output=tmp_path / "second", hook=lock) as second:
            wait_until(asked.exists)
            second.join(2)  # without the lock it would take one second
            assert second.exitcode is None
            go.touch()
            for process in (first, second):
                process.join(WAIT_S)
            printed = [(tmp_path / name).read_text() for name in ("first", "second")]
            assert (first.exitcode, second.exitcode) == (0, 0), printed
    assert [Path(one["model_path"]).name for one in registry.versions()] == ["one", "two"]
    for spec in ("1", "2"):
        registry.export(spec, tmp_path / f"out{spec}")


def test_copies_are_removed_wherever_the_experiment_keeps_them(registry: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    registry.client.create_experiment("pokegemma", artifact_location=elsewhere.as_uri())
    model = write_model(tmp_path / "model")
    register_and_kill(registry, "create_model_version", model)
    (killed,) = elsewhere.iterdir()
    registry.register(model, copy=True)
    assert killed not in set(elsewhere.iterdir())
    assert len(list(elsewhere.iterdir())) == 1


# --- as a script


@pytest.mark.slow
def test_registers_at_the_same_moment_make_one_version_of_each_content(tmp_path: Path) -> None:
    uri = tmp_path / "new" / "registry.db"  # both also want to make the tables
    models = [write_model(tmp_path / name, name) for name in ("one", "two")]
    outputs = [tmp_path / f"output{number}" for number in range(3)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                registry_process.started("register", "--model_path", models[at], "--registry_uri", uri, output=output)
            )
            for at, output in zip((0, 1, 0), outputs, strict=True)
        ]
        for process in processes:
            process.join(WAIT_S)
        printed = [output.read_text() for output in outputs]
        assert [process.exitcode for process in processes] == [0, 0, 0], printed
    assert sum("has this content already" in text for text in printed) == 1
    versions = Registry(str(uri), "pokegemma").versions()
    assert sorted(Path(one["model_path"]).name for one in versions) == ["one", "two"]
    assert [one["version"] for one in versions] == [1, 2]


@pytest.mark.slow
def test_no_network_is_used_and_no_log_is_printed(empty_registry: Path, tmp_path: Path) -> None:
    uri = shutil.copy(empty_registry, tmp_path / "registry.db")
    watch = (
        "import socket, time, atexit\n"
        f"note = open({str(tmp_path / 'asked')!r}, 'a')\n"
        "def ask(*arguments, **options):\n"
        "    note.write(f'{arguments}\\n'); note.flush(); raise OSError('no network')\n"
        "socket.getaddrinfo = ask\n"
        "socket.socket.connect = ask\n"
        "atexit.register(time.sleep, 1)\n"  # telemetry asks from a thread
    )
    model = write_model(tmp_path / "model")
    process = run_registry("register", "--model_path", model, "--registry_uri", uri, code=watch)
    stdout, stderr = process.communicate(timeout=300)
    assert stdout == f"registered {model} as pokegemma version 1\n", stderr
    assert [line for line in stderr.splitlines() if not line.startswith("warning: this version has no")] == []
    assert (tmp_path / "asked").read_text() == ""


def test_without_the_extra_one_line_names_it(tmp_path: Path) -> None:
    process = run_registry("list", code="import sys\nsys.modules['mlflow'] = None")
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (2, "error: the registry needs mlflow: ./init.sh --with registry\n")


@pytest.fixture
def call(registry: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that calls the script in this process and returns its stdout and stderr."""

    def call_script(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["model_registry.py", *map(str, words), "--registry_uri", str(registry.file)])
        model_registry.main()
        return capsys.readouterr()

    return call_script


def test_list_show_and_compare_print_json(
    registry: Any,
    add: Callable[..., int],
    call: Callable[..., Any],
    tmp_path: Path,
) -> None:
    add("one")
    add("two")

    listed, shown, compared = (
        json.loads(call(*words, "--json").out) for words in (("list",), ("show", "2"), ("compare", "1", "2"))
    )
    assert [one["version"] for one in listed] == [1, 2]
    assert shown["run"]["training"]["git_commit"] == "c0ffee"
    assert compared["accuracy_difference_interval"] == [0.0, 0.0]
    assert [one["version"] for one in compared["versions"]] == [1, 2]
    assert [line.split()[0] for line in call("list").out.splitlines()] == ["version", "1", "2"]
    assert "c0ffee" in call("show", "1").out
    (tmp_path / "file").touch()
    with pytest.raises(PokegemmaError, match=r"^--output .*file/done\.json cannot be written: "):
        call("register", "--model_path", str(tmp_path / "one"), "--output", str(tmp_path / "file" / "done.json"))


def test_a_failed_version_is_named_wherever_it_is_shown_and_check_fails(
    registry: Any,
    add: Callable[..., int],
    call: Callable[..., Any],
    tmp_path: Path,
) -> None:
    add("one", parity=False)
    add("two")
    add("three", num_wrong=70)
    registry.register(write_model(tmp_path / "four", "four"))
    registry.promote("1", "champion", force=True)
    warning = "warning: version 1 (champion): parity failed (model-f16.gguf)\n"

    lines, warned = call("list")
    assert warned == warning
    rows = []
    for version, alias, results in (
        ("1", "champion", "90.3 % failed"),
        ("2", "–", "90.3 % passed"),
        ("3", "–", "2.8 % (failed) passed"),
        ("4", "–", "– –"),
    ):
        described = registry.describe(version)
        content, path = described["content_sha256"][:12], described["model_path"]
        rows.append([version, alias, described["created"], *results.split(), "d" * 12, content, path])
    assert [line.split() for line in lines.splitlines()[1:]] == rows
    assert [Path(row[-1]).name for row in rows] == ["one", "two", "three", "four"]
    results_of_one = ("--evaluation", tmp_path / "one_eval", "--parity", tmp_path / "one_parity")
    for words in (
        ("show", "1"),
        ("show", "champion", "--json"),
        ("promote", "1", "--force"),
        ("export", "champion", "--output_dir", tmp_path / "out"),
        ("register", "--model_path", tmp_path / "one", *results_of_one),
    ):
        assert call(*words)[1] == warning, words
    registry.promote("2", "champion")
    assert call("rollback") == ("champion is version 1 again, after version 2\n", warning)
    with pytest.raises(CheckFailedError, match=r"^version 1 \(champion\): parity failed \(model-f16\.gguf\)$"):
        call("check", "champion")
    assert call("check", "2") == ("version 2: evaluation passed, parity passed\n", "")
    assert call("check", "4") == ("version 4: evaluation not measured, parity not measured\n", "")


def test_a_version_from_another_tool_is_shown_without_missing_fields(
    registry: Any,
    add: Callable[..., int],
    call: Callable[..., Any],
    tmp_path: Path,
) -> None:
    add("one")
    registry.client.create_model_version("pokegemma", str(tmp_path / "theirs"))
    assert call("list").out.splitlines()[2].split()[-5:] == ["–"] * 5
    assert "model_path      None" in call("show", "2").out
    assert "version 2 has no evaluation" in json.loads(call("compare", "1", "2", "--json").out)["warnings"]
    with pytest.raises(PokegemmaError, match=r"^version 2 "):
        registry.export("2", tmp_path / "out")


def test_a_registry_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PokegemmaError, match=r"^registry sqlite:.*file"):
        Registry(str(tmp_path / "file" / "registry.db"), "pokegemma", create=True).versions()


def test_a_model_that_is_refused_makes_no_registry(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=str(tmp_path)):
        Registry(str(tmp_path / "registry.db"), "pokegemma", create=True).register(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_registry_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.db").write_text("my notes, in no database")
    with pytest.raises(PokegemmaError, match=r"^registry sqlite:///.*mine\.db: .*not a database") as caught:
        Registry(str(tmp_path / "mine.db"), "pokegemma").versions()
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "mine.db").read_text() == "my notes, in no database"


def test_links_to_a_registry_share_its_lock(registry: Any, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(registry.file)
    assert Registry(str(link), "pokegemma").file == registry.file
