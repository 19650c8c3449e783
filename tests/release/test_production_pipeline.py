"""The pipeline on a tiny adapter: from checkpoint to registered version, and again with nothing redone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import FileHashes
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import PROJECT_ROOT, write_run_record
from pokegemma.release import hub
from pokegemma.release.options import PipelineOptions
from pokegemma.release.pipeline import explain, make_plan, run_plan
from pokegemma.release.step_runner import State, locked
from pokegemma.release.steps import hash_adapter
from pokegemma.training.options import ModelOptions
from pokegemma.training.trainable import lora_config

pytest.importorskip("pokegemma.release.registry", exc_type=PokegemmaError)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter with random weights, as training would leave it."""
    folder = tmp_path_factory.mktemp("adapter")
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    torch.manual_seed(0)
    model = get_peft_model(open_checkpoint(tiny_model).load_model(), lora_config(options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    write_run_record(
        folder,
        stage="train",
        options={"layout": "grid", "lora_r": 16},
        status="completed",
        base_model=str(tiny_model),
        base_fingerprint=open_checkpoint(tiny_model).weights_fingerprint(),
        dataset={"path": "gone", "sha256": "d" * 64},
    )
    return folder


def run_script(name: str, *words: str) -> str:
    command = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Release:
    """A pipeline's folder with a copy of the dataset, run through its script or within this process."""

    def __init__(self, folder: Path, adapter: Path, dataset: Path) -> None:
        self.dataset = Path(shutil.copytree(dataset, folder / "dataset"))
        self.output = folder / "release"
        self.options = {
            "checkpoint": str(adapter),
            "dataset_path": str(self.dataset),
            "output_dir": str(self.output),
            "exports": ["none"],
            "registry_uri": str(folder / "registry.db"),
            "max_samples": 4,
            "generate": False,
            "min_gain_over_baseline": -1.0,
            "device": "cpu",
        }

    def plan(self, **changes: Any) -> Any:
        return make_plan(PipelineOptions(**{**self.options, **changes}))

    def reasons(self, **changes: Any) -> dict[str, str]:
        return dict(explain(self.plan(**changes), State.read(self.output)))

    def run(self, **changes: Any) -> dict[str, bool]:
        """Run what has to run; return which steps did."""
        plan, state = self.plan(**changes), State.read(self.output)
        with locked(self.output) as lock:
            return {name: ran for name, ran, _ in run_plan(plan, state, lock=lock)}

    def call_script(self, *more: str) -> str:
        """Run the script in a process of its own; return what it printed."""
        flags = ["--no_generate" if key == "generate" else f"--{key}" for key in self.options]
        values = [value[0] if isinstance(value, list) else value for value in self.options.values()]
        words = [w for flag, v in zip(flags, values, strict=True) for w in ([flag] if v is False else [flag, str(v)])]
        return run_script("production_pipeline", *words, *more)

    def times(self) -> dict[str, str]:
        """Return when each step was done."""
        return {name: step["finished"] + str(step["seconds"]) for name, step in State.read(self.output).steps.items()}


@pytest.fixture(scope="module")
def release(adapter: Path, toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Return a release made by one command."""
    made = Release(tmp_path_factory.mktemp("pipeline"), adapter, toy_dataset)
    assert set(made.reasons()) == {"merge", "evaluate", "register"}
    assert not made.output.exists()  # asking made nothing
    said = json.loads(made.call_script("--json"))
    assert [(step["name"], step["ran"]) for step in said["steps"]] == [
        ("merge", True),
        ("evaluate", True),
        ("register", True),
    ]
    assert said["version"] == 1
    return made


@pytest.mark.slow
def test_one_command_leads_from_checkpoint_to_registered_version(release: Release) -> None:
    from pokegemma.release.registry import Registry

    described = Registry(release.options["registry_uri"], "pokegemma").describe("1")
    assert described["dataset_sha256"] == "d" * 64
    assert described["evaluation"]["num_decisions"] == 4
    assert Path(described["model_path"]) == release.output / "merged"
    for name in ("merged/model.safetensors", "evaluation/report.html", "logs/merge.log", "logs/register.log"):
        assert (release.output / name).is_file()
    assert (release.output / "README.md").read_text() == (release.output / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_again_nothing_is_redone(release: Release) -> None:
    before = release.times()
    assert release.run() == {"merge": False, "evaluate": False, "register": False}
    assert release.times() == before
    assert set(release.reasons().values()) == {"unchanged"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "option", "tight"),
    [
        ("verify", "max_stored_difference", 1e-9),
        ("verify", "max_stored_difference", 0.0),
        ("evaluate", "min_accuracy", 1.01),
        ("evaluate", "min_gain_over_baseline", 1.0),
    ],
)
def test_a_failed_gate_stops_with_value_and_limit_and_redoes_no_step(
    step: str, option: str, tight: float, release: Release
) -> None:
    before = release.times()
    with pytest.raises(CheckFailedError, match=rf"^the gate of {step} failed: .* --{option} {tight:.4g}"):
        release.run(**{option: tight})
    assert release.run() == {"merge": False, "evaluate": False, "register": False}
    assert release.times() == before


@pytest.mark.slow
def test_the_plan_names_what_each_change_would_redo(release: Release, tmp_path: Path) -> None:
    assert release.reasons(dtype="float32")["merge"] == "runs: settings changed"
    assert release.reasons(dtype="float32")["evaluate"] == "runs if what merge makes differs"
    changed = release.reasons(max_samples=5)
    assert (changed["merge"], changed["evaluate"]) == ("unchanged", "runs: settings changed")
    assert release.reasons(name="other")["register"] == "runs: settings changed"
    assert "no registry there" in release.reasons(registry_uri=release.options["registry_uri"] + "2")["register"] or (
        "settings changed" in release.reasons(registry_uri=release.options["registry_uri"] + "2")["register"]
    )


@pytest.mark.slow
def test_a_changed_dataset_redoes_evaluation_and_not_the_merge(release: Release) -> None:
    path = release.dataset / "eval.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 8  # merging verifies on the first eight
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert release.run() == {"merge": False, "evaluate": True, "register": True}
    log = (release.output / "logs" / "register.log").read_text()
    assert "version 1 has this content already" in log
    assert "its results of evaluation were replaced" in log
    assert release.run() == {"merge": False, "evaluate": False, "register": False}


@pytest.mark.slow
def test_a_version_that_the_registry_lost_is_registered_again(release: Release, tmp_path: Path) -> None:
    registry = Path(release.options["registry_uri"])
    registry.rename(tmp_path / "away.db")
    try:
        assert release.reasons()["register"].startswith(f"runs: {registry}: no registry there")
        other = shutil.copytree(release.output / "merged", tmp_path / "other")
        (other / "config.json").write_text("{}")
        # In processes of their own: this one has the file open that was here before.
        said = run_script("model_registry", "register", "--model_path", str(other), "--registry_uri", str(registry))
        assert "as pokegemma version 1" in said
        assert "runs: version 1 is another model now" in release.call_script("--dry_run")
    finally:
        (tmp_path / "away.db").rename(registry)


@pytest.mark.slow
def test_a_release_that_was_moved_goes_on_with_its_results(release: Release, tmp_path: Path) -> None:
    from pokegemma.release.registry import Registry

    old, new = release.output, tmp_path / "moved"
    old.rename(new)
    release.output = new
    try:
        assert release.run(output_dir=str(new)) == {"merge": False, "evaluate": False, "register": True}
        assert release.run(output_dir=str(new)) == {"merge": False, "evaluate": False, "register": False}
        Registry(release.options["registry_uri"], "pokegemma").export("1", tmp_path / "exported")
    finally:
        new.rename(old)
        release.output = old


def test_every_file_of_an_adapter_that_holds_weights_counts(tmp_path: Path) -> None:
    seen = set()
    for text in ("one", "two"):
        for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
            (tmp_path / name).write_text(text if name == "adapter_model.bin" else f"{text} of no matter")
        seen.add(hash_adapter(tmp_path, FileHashes()))
    assert len(seen) == 2
    (tmp_path / "training_args.bin").write_text("other")
    assert hash_adapter(tmp_path, FileHashes()) in seen


def test_what_is_missing_is_said_before_any_work(adapter: Path, toy_dataset: Path, tmp_path: Path) -> None:
    good = {"checkpoint": str(adapter), "dataset_path": str(toy_dataset), "output_dir": str(tmp_path / "out")}
    for changes, message in (
        ({"checkpoint": "missing"}, "--checkpoint missing: no such folder"),
        ({"checkpoint": str(toy_dataset)}, "no adapter .* and no model"),
        ({"dataset_path": "missing"}, "missing"),
        ({"exports": ["onnx"]}, "--exports: 'onnx' is not one of gguf, mlx, none"),
        ({"exports": ["none", "mlx"]}, "contradict each other"),
        ({"output_dir": str(adapter / "adapter_config.json")}, "adapter_config.json: not a folder"),
        ({"parity_samples": 0}, "--parity_samples: 0 is not at least 1"),
    ):
        with pytest.raises(PokegemmaError, match=message):
            make_plan(PipelineOptions(**{**good, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_is_not_merged(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    options = PipelineOptions(
        checkpoint=str(tiny_model), dataset_path=str(toy_dataset), output_dir=str(tmp_path / "out"), exports=["none"]
    )
    plan = make_plan(options)
    assert (plan.merges, plan.model) == (False, tiny_model)
    assert explain(plan, State.read(plan.output_dir)) == [
        ("merge", f"left out: {tiny_model} is a whole model"),
        ("evaluate", "runs: not done yet"),
        ("register", "runs: not done yet"),
    ]


def test_gates_of_exports_and_parity_judge_what_was_measured(
    tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "out"
    for name, size in (("model-f16.gguf", 4 << 20), ("model-q8_0.gguf", 2 << 20), ("mmproj-f16.gguf", 1 << 20)):
        (out / "gguf").mkdir(parents=True, exist_ok=True)
        (out / "gguf" / name).write_bytes(bytes(size))
    failure = {"gate": "log_probability_difference", "value": 0.3, "limit": 0.2, "message": "0.3 is above 0.2"}
    engine = {
        "name": "model-q8_0.gguf",
        "button_agreement": 0.96,
        "written_agreement": None,
        "failures": [failure],
        "button_log_probability_difference": {"mean": 0.1, "max": 1.0},
        "log_probability_difference": {"mean": 0.3, "max": 1.0},
    }
    (out / "parity").mkdir()
    (out / "parity" / "parity.json").write_text(json.dumps({"engines": [engine]}))

    def failed(step: str, **changes: Any) -> list[str]:
        options = PipelineOptions(
            checkpoint=str(tiny_model), dataset_path=str(toy_dataset), output_dir=str(out), **changes
        )
        steps = {one.name: one for one in make_plan(options).steps}
        assert list(steps) == ["evaluate", "export_gguf", "parity", "register"]
        return [str(gate) for gate in steps[step].gates() if not gate.holds]

    assert failed("export_gguf", max_export_gib=0.004) == []
    assert failed("export_gguf", max_export_gib=0.002) == [
        "smallest model in gguf 0.00293, --max_export_gib 0.002 (at most)"
    ]
    unlike = "model-q8_0.gguf button_agreement 0.96, --min_agreement 0.98 (at least)"
    far = "model-q8_0.gguf log_probability_difference 0.3, --max_log_probability_difference"
    assert failed("parity") == [unlike, f"{far} 0.2 (at most)"]
    assert failed("parity", min_agreement=0.95) == [f"{far} 0.2 (at most)"]
    assert failed("parity", min_agreement=0.95, max_log_probability_difference=0.25) == [f"{far} 0.25 (at most)"]
    assert failed("parity", min_agreement=0.95, max_log_probability_difference=0.35) == []
    silent = {**failure, "value": None, "message": "it tells no log-probabilities, which have a limit"}
    (out / "parity" / "parity.json").write_text(
        json.dumps({"engines": [{**engine, "log_probability_difference": None, "failures": [silent]}]})
    )
    assert failed("parity", min_agreement=0.95) == [
        "model-q8_0.gguf log_probability_difference not measured, --max_log_probability_difference 0.2 (at most)"
    ]
    died = {
        "name": "mlx",
        "passed": False,
        "failures": [
            {
                "gate": "runs",
                "value": None,
                "limit": None,
                "sample": None,
                "message": "killed by SIGKILL: out of memory",
            }
        ],
    }
    (out / "parity" / "parity.json").write_text(json.dumps({"engines": [died]}))
    for changes in ({"min_agreement": 0.0}, {"min_agreement": 0.0, "max_log_probability_difference": 9.0}):
        assert failed("parity", **changes) == [
            "mlx failed (killed by SIGKILL: out of memory), its agreement not measured, --min_agreement 0 (at least)"
        ]


# --- the Hub


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for; `server.seen` collects it."""

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.server.refuses:
            self.answer({"error": "You don't have the rights"}, status=403)
        else:
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body.decode()))
        if self.server.refuses:
            self.answer({"error": "You don't have the rights"}, status=403)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({})

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen, server.refuses, server.url = [], False, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_upload_holds_model_exports_and_card_and_no_run_json(stand_in: Any, tmp_path: Path) -> None:
    model, gguf = tmp_path / "merged", tmp_path / "gguf"
    for folder, names in ((model, ("config.json", "model.safetensors", "run.json", "README.md")), (gguf, ("m.gguf",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f"{folder.name} {name}")
    url = hub.push("me/model", model, card="# card", exports={"gguf": gguf}, private=True, endpoint=stand_in.url)
    assert url == f"{stand_in.url}/me/model/commit/1"
    created = next(body for path, _, body in stand_in.seen if path.endswith("/repos/create"))
    assert json.loads(created)["visibility"] == "private"
    committed = next(body for path, _, body in stand_in.seen if "/commit/" in path)
    lines = [json.loads(line)["value"] for line in committed.splitlines()]
    paths = {line["path"] for line in lines if "path" in line}
    assert paths == {"README.md", "config.json", "model.safetensors", "gguf/m.gguf"}
    assert {token for _, token, _ in stand_in.seen} == {"Bearer hf_secret"}
    stand_in.refuses = True
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub me/model: .*403"):
        hub.push("me/model", model, card="# card", exports={}, private=True, endpoint=stand_in.url)
    with pytest.raises(PokegemmaError, match=r"^--push_to_hub me/model: "):  # nobody listens there
        hub.push("me/model", model, card="# card", exports={}, private=True, endpoint="http://127.0.0.1:9")


def test_an_upload_that_cannot_work_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PokegemmaError, match="--push_to_hub: no token; run `hf auth login`"):
        hub.check_hub("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.check_hub("me/model")
    with pytest.raises(PokegemmaError, match="write it as OWNER/NAME"):
        hub.check_hub("model")
    with pytest.raises(PokegemmaError, match="--push_to_hub me//model"):
        hub.check_hub("me//model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PokegemmaError, match="HF_HUB_OFFLINE is set"):
        hub.check_hub("me/model")
