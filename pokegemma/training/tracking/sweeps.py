"""A sweep of Weights & Biases over flags of the training script: check it, draw a trial, run one offline."""

import dataclasses
import difflib
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
import yaml
from transformers.integrations.integration_utils import rewrite_logs
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib.runid import generate_id

from pokegemma.cli import parse_options
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.tracking.settings import read_history

PROGRAM = "scripts/sft_pokemon_gemma3.py"
METRICS = tuple(rewrite_logs(dict.fromkeys(("eval_button_accuracy", "eval_loss", "loss"))))
"""What training logs to W&B that a sweep can go by, under the names of transformers' WandbCallback."""

_OPTION_TYPES = (DataOptions, TrainingOptions, ModelOptions)
_FLAGS = frozenset(option.name for kind in _OPTION_TYPES for option in dataclasses.fields(kind))
_RANGES = ("uniform", "log_uniform_values", "int_uniform")
_NUM_CHECKED_DRAWS = 5


def read_sweep(tracking: Mapping[str, Any], *, fixed: Sequence[str] = (), source: str) -> dict[str, Any]:
    """Return the sweep section of wandb_config.yaml, checked.

    Args:
        fixed: "name=value", flags that every trial gets, instead of what the section says of them.
        source: the file, for messages.

    Raises:
        PokegemmaError: a parameter that is no flag of the training script, or whose values it refuses; a metric that
            is not logged.
    """
    sweep = tracking.get("sweep")
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise PokegemmaError(f"{source}: no sweep section with parameters")
    parameters = dict(sweep["parameters"])
    for setting in fixed:
        name, equals, value = setting.partition("=")
        if not equals:
            raise PokegemmaError(f"--fixed {setting}: give name=value")
        parameters[name] = {"value": yaml.safe_load(value)}
    sweep = {**sweep, "parameters": parameters}
    _check_sweep(sweep, source)
    return sweep


def _check_sweep(sweep: Mapping[str, Any], source: str) -> None:
    if sweep.get("program") != PROGRAM:
        raise PokegemmaError(f"{source}: sweep: program: {sweep.get('program')} is not {PROGRAM}")
    metric = sweep.get("metric") or {}
    if metric.get("name") not in METRICS or metric.get("goal") not in ("maximize", "minimize"):
        raise PokegemmaError(
            f"{source}: sweep: metric: {metric} needs a goal (maximize or minimize) and a name that training logs: "
            f"{', '.join(METRICS)}"
        )
    parameters = sweep["parameters"]
    for name, parameter in parameters.items():
        where = f"{source}: sweep parameter {name}"
        if name not in _FLAGS:
            near = difflib.get_close_matches(str(name), _FLAGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PokegemmaError(f"{where} is no flag of {PROGRAM}{hint}")
        for value in _extremes(parameter, where):
            _check_flags({name: value}, where)
    if parameters.get("report_to") != {"value": "wandb"}:
        raise PokegemmaError(f"{source}: sweep: without report_to: {{value: wandb}} no trial would log its metric")
    for seed in range(_NUM_CHECKED_DRAWS):  # values that are refused only together
        _check_flags(draw(sweep, seed=seed), f"{source}: sweep")


def _check_flags(values: Mapping[str, Any], where: str) -> None:
    """Check that the training script takes these values, by reading them as it does."""
    argv = [f"--{name}={value}" for name, value in {"dataset_path": "x", **values}.items()]
    try:
        parse_options(*_OPTION_TYPES, description="", argv=argv)
    except PokegemmaError as error:
        raise PokegemmaError(f"{where}: {error}") from error


def _extremes(parameter: Any, where: str) -> list[Any]:
    """Return the values between which all others of a parameter lie.

    Raises:
        PokegemmaError: the parameter is none that `draw` knows.
    """
    if isinstance(parameter, dict) and "value" in parameter:
        return [parameter["value"]]
    if isinstance(parameter, dict) and isinstance(parameter.get("values"), list) and parameter["values"]:
        return parameter["values"]
    kind = parameter.get("distribution") if isinstance(parameter, dict) else None
    if kind not in _RANGES:
        raise PokegemmaError(f"{where}: give value, values, or a distribution ({', '.join(_RANGES)}) with min and max")
    ends = [parameter.get("min"), parameter.get("max")]
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
        raise PokegemmaError(f"{where}: min {ends[0]} and max {ends[1]} are no range (1e-5 is text in YAML: 1.0e-5)")
    if kind == "log_uniform_values" and ends[0] <= 0:
        raise PokegemmaError(f"{where}: min {ends[0]} has no logarithm")
    return [int(end) if kind == "int_uniform" else float(end) for end in ends]


def draw(sweep: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Return one configuration, drawn at random from the sweep's parameters; the same for the same seed.

    W&B's own search runs on its server only. Its former local one (`sweeps` on PyPI, last released in 2022) brings
    jsonref and a pydantic 1 interface for what are three lines here.
    """
    generator, drawn = random.Random(seed), {}
    for name, parameter in sorted(sweep["parameters"].items()):
        if "distribution" not in parameter:
            values = parameter.get("values", [parameter.get("value")])
            drawn[name] = generator.choices(values, weights=parameter.get("probabilities"))[0]
            continue
        low, high = parameter["min"], parameter["max"]
        if parameter["distribution"] == "int_uniform":
            drawn[name] = generator.randint(low, high)
        elif parameter["distribution"] == "uniform":
            drawn[name] = generator.uniform(low, high)
        else:
            drawn[name] = math.exp(generator.uniform(math.log(low), math.log(high)))
    return drawn


def trial_command(sweep: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[str]:
    """Return the command that `wandb agent` runs for a configuration; it is filled in by W&B's own functions.

    The agent itself needs the server, also to run a single trial.
    """
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    parts |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
    command: list[str] = []
    for word in create_sweep_command(list(sweep.get("command") or [])):
        command += parts.get(str(word)[2:-1], []) if str(word).startswith("${") else [str(word)]
    return command


def run_trial_offline(sweep: Mapping[str, Any], *, seed: int, project: str) -> tuple[Path, float]:
    """Draw a configuration, train with it as an agent would, offline; return W&B's folder of the run and its metric.

    Raises:
        CheckFailedError: training failed, or did not log the metric.
    """
    run_id = generate_id()
    folder = Path(os.environ.get("WANDB_DIR") or PROJECT_ROOT) / "wandb"
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_RUN_ID": run_id, "WANDB_PROJECT": project}
    command = trial_command(sweep, draw(sweep, seed=seed))
    status = subprocess.run(command, cwd=PROJECT_ROOT, env=environ, stdout=sys.stderr, check=False).returncode
    if status:
        raise CheckFailedError(f"the trial ended with exit status {status}; its output is above")
    runs = sorted(folder.glob(f"offline-run-*-{run_id}"))
    name = sweep["metric"]["name"]
    logged = [values[name] for run in runs for values in read_history(run) if name in values]
    if not logged:
        raise CheckFailedError(f"the trial logged no {name} below {folder}")
    return runs[0], logged[-1]


def create_sweep(sweep: Mapping[str, Any], *, project: str, entity: str | None) -> str:
    """Create the project, where there is none, and the sweep on W&B's server; return the command of an agent.

    Raises:
        PokegemmaError: no key, or the server refuses.
    """
    if os.environ.get("WANDB_MODE", "online") != "online":
        raise PokegemmaError(
            f"WANDB_MODE is {os.environ['WANDB_MODE']}, a sweep needs the server; or pass --trial_offline"
        )
    try:
        if not wandb.login(prompt=False):
            raise PokegemmaError(
                "no key of Weights & Biases: set WANDB_API_KEY, or run `wandb login`; or --trial_offline"
            )
        api = wandb.Api()
        entity = entity or api.default_entity
        api.create_project(project, entity)
        sweep_id = wandb.sweep(dict(sweep), entity=entity, project=project)
    except (wandb.Error, OSError, ValueError) as error:
        raise PokegemmaError(f"Weights & Biases: {' '.join(str(error).split())[:300]}") from error
    return f"wandb agent {entity}/{project}/{sweep_id}"
