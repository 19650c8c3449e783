"""A sweep of Weights & Biases over flags of the training script: check it, draw a trial, run a trial offline."""

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
from pokegemma.training.tracking.settings import read_summary

PROGRAM = "scripts/sft_pokemon_gemma3.py"
METRICS = tuple(rewrite_logs(dict.fromkeys(("eval_button_accuracy", "eval_loss", "loss"))))
"""Metrics that training logs to W&B and a sweep can use, as transformers' WandbCallback names them."""

_OPTION_TYPES = (DataOptions, TrainingOptions, ModelOptions)
_FLAGS = frozenset(option.name for kind in _OPTION_TYPES for option in dataclasses.fields(kind))
_RANGES = ("uniform", "log_uniform_values", "int_uniform")
_NUM_CHECKED_DRAWS = 5


def read_sweep(tracking: Mapping[str, Any], *, fixed: Sequence[str] = (), source: str) -> dict[str, Any]:
    """Return the sweep section of wandb_config.yaml, checked.

    Args:
        fixed: "name=value", flags of every trial, which replace parameters of the section.
        source: the file, for messages.

    Raises:
        PokegemmaError: a parameter is not a flag of the training script, or the script refuses its values; or the
            metric is not logged.
    """
    sweep = tracking.get("sweep")
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise PokegemmaError(f"{source}: the sweep section with parameters is missing")
    parameters = dict(sweep["parameters"])
    for setting in fixed:
        name, equals, value = setting.partition("=")
        if not equals:
            raise PokegemmaError(f"--fixed {setting}: must be name=value")
        parameters[name] = {"value": yaml.safe_load(value)}
    sweep = {**sweep, "parameters": parameters}
    _check_sweep(sweep, source)
    return sweep


def _check_sweep(sweep: Mapping[str, Any], source: str) -> None:
    if sweep.get("program") != PROGRAM:
        raise PokegemmaError(f"{source}: sweep: program {sweep.get('program')}: must be {PROGRAM}")
    metric = sweep.get("metric") or {}
    if metric.get("name") not in METRICS or metric.get("goal") not in ("maximize", "minimize"):
        raise PokegemmaError(
            f"{source}: sweep: metric {metric}: needs a goal (maximize or minimize) and a name that training logs: "
            f"{', '.join(METRICS)}"
        )
    parameters = sweep["parameters"]
    for name, parameter in parameters.items():
        where = f"{source}: sweep parameter {name}"
        if name not in _FLAGS:
            near = difflib.get_close_matches(str(name), _FLAGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PokegemmaError(f"{where}: not a flag of {PROGRAM}{hint}")
        for value in _extremes(parameter, where):
            _check_flags({name: value}, where)
    if parameters.get("report_to") != {"value": "wandb"}:
        raise PokegemmaError(f"{source}: sweep: report_to must be {{value: wandb}}, so that trials log their metric")
    for seed in range(_NUM_CHECKED_DRAWS):  # values that are refused only together
        _check_flags(draw(sweep, seed=seed), f"{source}: sweep")


def _check_flags(values: Mapping[str, Any], where: str) -> None:
    """Check that the training script accepts these values, with the parser of the script."""
    argv = [f"--{name}={value}" for name, value in {"dataset_path": "x", **values}.items()]
    try:
        parse_options(*_OPTION_TYPES, description="", argv=argv)
    except PokegemmaError as error:
        raise PokegemmaError(f"{where}: {error}") from error


def _extremes(parameter: Any, where: str) -> list[Any]:
    """Return the values of a parameter, or the ends of its range.

    Raises:
        PokegemmaError: `draw` cannot draw from the parameter.
    """
    if isinstance(parameter, dict) and "value" in parameter:
        return [parameter["value"]]
    if isinstance(parameter, dict) and isinstance(parameter.get("values"), list) and parameter["values"]:
        return parameter["values"]
    kind = parameter.get("distribution") if isinstance(parameter, dict) else None
    if kind not in _RANGES:
        raise PokegemmaError(f"{where}: needs value, values, or a distribution ({', '.join(_RANGES)}) with min and max")
    ends = [parameter.get("min"), parameter.get("max")]
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
        raise PokegemmaError(
            f"{where}: min {ends[0]} and max {ends[1]} are not a range (YAML reads 1e-5 as text; write 1.0e-5)"
        )
    if kind == "log_uniform_values" and ends[0] <= 0:
        raise PokegemmaError(f"{where}: min {ends[0]}: must be above 0 for log_uniform_values")
    return [int(end) if kind == "int_uniform" else float(end) for end in ends]


def draw(sweep: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Return one configuration, drawn at random from the sweep's parameters; the same for the same seed.

    W&B's own search runs on its server only; its local one (`sweeps` on PyPI) was last released in 2022.
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
    name = sweep["metric"]["name"]
    try:
        (run,) = folder.glob(f"offline-run-*-{run_id}")
        return run, read_summary(run)[name]
    except (ValueError, OSError, KeyError) as error:
        raise CheckFailedError(f"the trial did not log {name} below {folder}") from error


def create_sweep(sweep: Mapping[str, Any], *, project: str, entity: str | None) -> str:
    """Create the project, if it is missing, and the sweep on W&B's server; return the command of an agent.

    Raises:
        PokegemmaError: there is no key, or the server refuses.
    """
    if os.environ.get("WANDB_MODE", "online") != "online":
        raise PokegemmaError(
            f"WANDB_MODE={os.environ['WANDB_MODE']}: a sweep needs WANDB_MODE=online; or pass --trial_offline"
        )
    try:
        if not wandb.login(prompt=False):
            raise PokegemmaError(
                "Weights & Biases has no key: set WANDB_API_KEY, run `wandb login`, or pass --trial_offline"
            )
        api = wandb.Api()
        entity = entity or api.default_entity
        api.create_project(project, entity)
        sweep_id = wandb.sweep(dict(sweep), entity=entity, project=project)
    except (wandb.Error, OSError, ValueError) as error:
        raise PokegemmaError(f"Weights & Biases: {' '.join(str(error).split())[:300]}") from error
    return f"wandb agent {entity}/{project}/{sweep_id}"
