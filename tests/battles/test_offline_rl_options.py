"""Options of offline reinforcement learning: each one that --help shows is read by somebody, or refused."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import trl
from transformers import Trainer

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.offline_rl.options import UNUSED, OfflineRLOptions, OfflineRLTrainingOptions
from pokegemma.battles.offline_rl.trainer import OfflineRLTrainer
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import call_script

OURS = [
    *(PROJECT_ROOT / "pokegemma" / "battles" / "offline_rl").glob("*.py"),
    PROJECT_ROOT / "pokegemma" / "battles" / "training_run.py",
    PROJECT_ROOT / "pokegemma" / "battles" / "cloning" / "options.py",
    *(PROJECT_ROOT / "pokegemma" / "training").rglob("*.py"),
]
LIBRARY = Path(transformers.__file__).parent
LIBRARIES = [*LIBRARY.glob("trainer*.py"), LIBRARY / "training_args.py", *(LIBRARY / "integrations").glob("*.py")]
REPLACED = {"compute_loss", "prediction_step"}
"""Methods of Trainer that ours replaces without calling them."""


def loaded_names(path: Path, *, without: set[str]) -> Iterator[str]:
    """Yield the attributes that a module reads, but for those in functions of some names."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef) and node.name in without:
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def test_the_replaced_methods_are_those_of_our_trainer() -> None:
    tree = ast.parse((PROJECT_ROOT / "pokegemma/battles/offline_rl/trainer.py").read_text())
    (trainer,) = (node for node in tree.body if getattr(node, "name", "") == OfflineRLTrainer.__name__)
    methods = {node.name: node for node in trainer.body if isinstance(node, ast.FunctionDef)}
    assert {
        name
        for name, node in methods.items()
        if hasattr(Trainer, name) and not any(getattr(each, "id", "") == "super" for each in ast.walk(node))
    } == REPLACED


def test_every_option_is_read_or_refused() -> None:
    """A name that is read somewhere need not act; one that is read nowhere cannot."""
    read_here = {name for path in OURS for name in loaded_names(path, without={"__post_init__"})}
    read_there = {name for path in LIBRARIES for name in loaded_names(path, without=REPLACED)}
    ours = {each.name for each in dataclasses.fields(OfflineRLOptions)}
    theirs = {each.name for each in dataclasses.fields(OfflineRLTrainingOptions)}
    assert {"encoder", "won_only", "window"} <= ours and {"adam_beta1", "packing", "do_predict"} <= theirs
    assert ours - read_here == set()
    assert theirs - read_here - read_there - set(UNUSED) == set()


def changed(default: object) -> object:
    """Return another value of an option's type."""
    if isinstance(default, bool):
        return not default
    return {type(None): "x", str: "x", int: 7, float: 0.5, list: ["x"]}[type(default)]


@pytest.mark.parametrize("name", UNUSED)
def test_an_option_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    default, _ = UNUSED[name]
    kind = OfflineRLTrainingOptions
    kind(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{name: default})
    with pytest.raises(PokegemmaError, match=f"--{name} .* is not supported: "):
        kind(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{name: changed(default)})


def test_what_sft_alone_has_is_refused() -> None:
    added = {each.name for each in dataclasses.fields(trl.SFTConfig)} - {
        each.name for each in dataclasses.fields(transformers.TrainingArguments)
    }
    assert added <= set(UNUSED) and {"packing", "loss_type", "max_length"} <= added


@pytest.mark.parametrize("option", ["--text", "--max_eval_decisions"])
def test_the_text_is_the_encoders_and_all_decisions_are_evaluated(option: str) -> None:
    done = call_script("rl_battles", "--trajectories_dir", "x", "--encoder", "x", option, "7")
    assert done.returncode == 2 and f"unknown options: ['{option}'" in done.stderr
