import copy
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.training.tracking import sweeps
from pokegemma.training.tracking.settings import read_summary, read_tracking, track
from tests.processes import call_script

SHIPPED = yaml.safe_load((PROJECT_ROOT / "wandb_config.yaml").read_text(encoding="utf-8"))


def read(parameters=None, *, fixed=(), **changes):
    """Read the shipped sweep with other parameters (None: removed) and other keys."""
    settings = copy.deepcopy(SHIPPED)
    settings["sweep"] |= changes
    settings["sweep"]["parameters"] |= parameters or {}
    settings["sweep"]["parameters"] = {k: v for k, v in settings["sweep"]["parameters"].items() if v is not None}
    return sweeps.read_sweep(settings, fixed=fixed, source="wandb.yaml")


def test_the_shipped_sweep_maximises_button_accuracy_over_flags_that_exist():
    sweep = read()
    assert sweep["metric"] == {"name": "eval/button_accuracy", "goal": "maximize"}
    done = call_script(Path(sweeps.PROGRAM).stem, "--help")
    assert done.returncode == 0
    assert {"learning_rate", "lora_r"} < set(sweep["parameters"])
    assert [name for name in sweep["parameters"] if f"--{name} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"lora_rank": {"values": [8]}}, "parameter lora_rank: .*scripts/sft_pokemon_gemma3.py"),
        (
            {"learning_rat": {"value": 1.0e-4}},
            "parameter learning_rat: .*learning_rate",
        ),
        ({"lora_r": {"values": [8, "many"]}}, "parameter lora_r: .*invalid int value: 'many'"),
        ({"lora_r": {"distribution": "uniform", "min": 8, "max": 64}}, "parameter lora_r: .*invalid int value: '8.0'"),
        ({"layout": {"values": ["grid", "film"]}}, "parameter layout: .*'film'"),
        ({"fp16": {"values": [False, True]}}, "parameter fp16: --fp16 overflows in Gemma 3"),
        ({"learning_rate": {"distribution": "uniform", "min": "1e-5", "max": 1}}, "min 1e-5 and max 1 "),
        ({"learning_rate": {"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}}, "min 0.0: "),
        ({"learning_rate": {"distribution": "beta"}}, "parameter learning_rate: .*distribution"),
        ({"learning_rate": 1.0e-4}, "parameter learning_rate: .*distribution"),
        ({"report_to": None}, "report_to .*{value: wandb}"),
    ],
)
def test_a_parameter_that_training_would_refuse_is_refused_in_a_line(parameters, error):
    with pytest.raises(PokegemmaError, match=rf"^wandb.yaml: sweep.*{error}") as raised:
        read(parameters)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "metric", [{"name": "eval_button_accuracy", "goal": "maximize"}, {"name": "eval/button_accuracy"}, {}]
)
def test_a_metric_that_is_not_logged_is_refused(metric):
    with pytest.raises(PokegemmaError, match=r"eval/button_accuracy, eval/loss, train/loss$"):
        read(metric=metric)


def test_fixed_flags_take_the_place_of_drawn_ones():
    sweep = read(fixed=["lora_r=4", "max_steps=20", "train_projector=false"])
    drawn = sweeps.draw(sweep, seed=0)
    assert (drawn["lora_r"], drawn["max_steps"], drawn["train_projector"]) == (4, 20, False)
    with pytest.raises(PokegemmaError, match=r"^--fixed max_steps: "):
        read(fixed=["max_steps"])


def test_draws_are_reproducible_and_stay_in_their_ranges():
    sweep = read()
    assert sweeps.draw(sweep, seed=3) == sweeps.draw(sweep, seed=3) != sweeps.draw(sweep, seed=4)
    draws = [sweeps.draw(sweep, seed=seed) for seed in range(300)]
    rates = sorted(drawn["learning_rate"] for drawn in draws)
    assert 5e-5 <= rates[0] < 7e-5 and 8e-4 < rates[-1] <= 1e-3
    assert 1.6e-4 < rates[150] < 3.2e-4  # the middle of the logarithms is 2.2e-4
    assert {drawn["lora_r"] for drawn in draws} == {8, 16, 32, 64}
    assert {drawn["num_train_epochs"] for drawn in draws} == {1, 2, 3, 4, 5}
    assert all(0 <= drawn["lora_dropout"] <= 0.15 for drawn in draws)


def test_probabilities_weigh_the_values():
    sweep = read({"lora_r": {"values": [8, 16], "probabilities": [0.9, 0.1]}})
    draws = [sweeps.draw(sweep, seed=seed)["lora_r"] for seed in range(300)]
    assert 240 < draws.count(8) < 299


def test_a_trial_runs_the_command_of_an_agent_with_a_folder_of_its_own(tmp_path):
    sweep = read()
    command = sweeps.trial_command(sweep, {"lora_r": 8, "train_projector": False})
    assert command == [
        "/usr/bin/env",
        "bash",
        "-c",
        'exec "$0" "$@" --output_dir "outputs/sweep/$WANDB_RUN_ID"',
        sys.executable,
        "scripts/sft_pokemon_gemma3.py",
        "--lora_r=8",
        "--train_projector=False",
    ]
    command[4:6] = ["echo"]
    environ = os.environ | {"WANDB_RUN_ID": "abc"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "--lora_r=8 --train_projector=False --output_dir outputs/sweep/abc\n"


def test_the_environment_wins_over_wandb_config(monkeypatch):
    for name in ("PROJECT", "ENTITY", "TAGS", "MODE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert read_tracking()["project"] == "pokegemma"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert read_tracking()["project"] == "mine"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_TAGS", "x")
    track(["tensorboard"])
    assert "WANDB_ENTITY" not in os.environ
    track(["wandb"])
    names = ("WANDB_PROJECT", "WANDB_MODE", "WANDB_TAGS")
    assert [os.environ[name] for name in names] == ["mine", "offline", "x"]


class Server:
    """Stand for W&B's server, and keep the calls that it gets."""

    def __init__(self, monkeypatch, *, key):
        self.calls, self.default_entity = [], "team"
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr(sweeps.wandb, "login", lambda **options: key)
        monkeypatch.setattr(sweeps.wandb, "Api", lambda: self)
        monkeypatch.setattr(sweeps.wandb, "sweep", self.sweep)

    def create_project(self, name, entity):
        self.calls.append((name, entity))

    def sweep(self, config, *, entity, project):
        self.calls.append((config["name"], entity, project))
        return "s1"


def test_the_project_is_created_before_the_sweep(monkeypatch):
    server = Server(monkeypatch, key=True)
    assert sweeps.create_sweep(read(), project="p", entity=None) == "wandb agent team/p/s1"
    assert server.calls == [("p", "team"), ("gemma3-lora", "team", "p")]


def test_without_a_key_the_server_gets_no_request(monkeypatch):
    server = Server(monkeypatch, key=False)
    with pytest.raises(PokegemmaError, match=r"WANDB_API_KEY"):
        sweeps.create_sweep(read(), project="p", entity=None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(PokegemmaError, match=r"^WANDB_MODE=offline: "):
        sweeps.create_sweep(read(), project="p", entity=None)
    assert server.calls == []


@pytest.mark.slow
def test_an_offline_trial_trains_and_its_run_holds_the_metric(tiny_model, toy_dataset, tmp_path, forked_python):
    settings = copy.deepcopy(SHIPPED)
    settings["sweep"]["command"][3] = f'exec "$0" "$@" --output_dir "{tmp_path}/$WANDB_RUN_ID"'
    (tmp_path / "wandb.yaml").write_text(yaml.safe_dump(settings))
    fixed = (
        f"model_name_or_path={tiny_model} dataset_path={toy_dataset} finetuning=lora max_steps=1 eval_steps=1 "
        "per_device_train_batch_size=1 gradient_accumulation_steps=1 dataloader_num_workers=0 use_cpu=true"
    )
    command = [
        forked_python,
        "scripts/setup_wandb.py",
        "--wandb_config",
        str(tmp_path / "wandb.yaml"),
        "--trial_offline",
        "--seed",
        "5",
        "--fixed",
        *shlex.split(fixed),
    ]
    done = subprocess.run(
        command,
        cwd=PROJECT_ROOT,
        env=os.environ | {"WANDB_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (output,) = tmp_path.glob("*/adapter_config.json")
    assert run.name.endswith(output.parent.name)  # the run's id
    accuracy = read_summary(run)["eval/button_accuracy"]
    assert done.stdout == f"eval/button_accuracy {accuracy:.4f}\nupload: wandb sync {run}\n"
    drawn = sweeps.draw(read(fixed=shlex.split(fixed)), seed=5)
    options = json.loads((output.parent / "run.json").read_text())["options"]
    assert (options["lora_r"], options["learning_rate"]) == (drawn["lora_r"], drawn["learning_rate"])
