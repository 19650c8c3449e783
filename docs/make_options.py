"""Write the tables of docs/options.md from the options of the scripts.

python docs/make_options.py
"""

import importlib
import inspect
import sys
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from pokegemma import cli

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = Path(__file__).with_name("options.md")
START = "<!-- From here on python docs/make_options.py writes this page. -->\n"

IN_INTRODUCTION = ("overwrite", "json")

SCRIPTS = {
    "convert_eevee_data_v2": "Convert recorded sessions",
    "inspect_data": "Look at the data",
    "validate_training": "Check before training",
    "find_batch_size": "Find the batch size",
    "sft_pokemon_gemma3": "Train",
    "precompute_features": "Encode frames before training",
    "merge_qlora": "Merge an adapter",
    "evaluate": "Measure a model",
    "convert_to_gguf": "Export for llama.cpp",
    "convert_to_mlx": "Export for MLX",
    "check_parity": "Compare exports",
    "serve": "Start a server",
    "mlx_inference_server": "Start an MLX server",
    "health_monitor": "Watch a server",
    "play": "Play",
    "make_replay": "Replay recorded play",
    "improve": "Learn from play",
    "production_pipeline": "Release",
    "model_registry": "Versions",
    "setup_wandb": "Sweeps",
    "battles_record": "Record battles",
    "battles_arena": "Arena of battles",
    "battles_online": "Battles against people",
    "battles_check": "Check trajectories of battles",
    "battles_pack": "Pack trajectories of battles",
    "battles_tiny_model": "Make a tiny policy for battles",
    "sft_battles": "Train a policy for battles",
    "rl_battles": "Improve a policy offline",
    "battles_selfplay": "Self-play of a policy",
    "battles_psro": "Equilibria of players",
    "battles_parity": "Compare the GGUF file of a policy",
    "battles_card": "Write the card of a policy",
    "record_toy_game": "Record the toy game",
    "build_toy_rom": "Build a ROM of the toy game",
    "make_tiny_model": "Make a tiny model",
    "make_gemma270m": "Make a checkpoint of a real 270M",
    "describe_environment": "Describe this machine",
}


class _ParserCaught(BaseException):
    """Ends a script when its parser is complete; not an Exception, so that no script handles it."""


def parser_of(module: str, *words: str) -> cli._Parser:
    """Return the parser of a script, such as "scripts.serve", when it is called with `words`."""

    def catch(parser: cli._Parser, *_: object, **__: object) -> None:
        raise _ParserCaught(parser)

    main = importlib.import_module(module).main
    with (
        mock.patch.object(cli._Parser, "parse_args_and_config", catch),
        mock.patch.object(sys, "argv", [module, *words]),
    ):
        try:
            main()
        except _ParserCaught as caught:
            return caught.args[0]
    raise AssertionError(f"{module} parsed no options")


def our_classes(*option_types: type) -> list[type]:
    """Return the classes that define options here: a subclass of TRL's options defines only those that it changes."""
    bases = [base for option_type in option_types for base in reversed(option_type.__mro__)]
    return [base for base in dict.fromkeys(bases) if base.__module__.startswith(("pokegemma.", "scripts."))]


def fields_of(classes: list[type]) -> list[str]:
    return [name for kind in classes for name in inspect.get_annotations(kind)]


def rows(parser: cli._Parser, names: list[str]) -> list[str]:
    """Return a table of options: flag, default, help. The page's introduction describes `IN_INTRODUCTION`."""
    flags: dict[str, list[str]] = {}
    actions: dict[str, Action] = {}
    for action in parser._actions:
        flags.setdefault(action.dest, []).extend(
            flag for flag in action.option_strings if "_" in flag or "-" not in flag[2:]
        )
        actions.setdefault(action.dest, action)  # the first of --grid_images, --no_grid_images has the help
    lines = ["| option | default | |", "|---|---|---|"]
    for name in names:
        if name in IN_INTRODUCTION:
            continue
        text = " ".join((actions[name].help or "").split()).replace("|", r"\|")
        written = ", ".join(f"`{flag}`" for flag in flags[name])
        lines.append(f"| {written} | {default_of(actions[name], text)} | {text} |")
    return [*lines, ""]


def default_of(action: Action, text: str) -> str:
    """Return what the column for defaults contains: nothing where the help names the default, or there is none."""
    value = action.default
    if action.required:
        return "required"
    if value in (None, "", []) or value is False or "default" in text.lower():
        return ""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "`true`" if value is True else f"`{value}`"


def sections() -> Iterator[str]:
    """Yield the lines of the generated part. An option class that several scripts share is printed once."""
    training = parser_of("scripts.sft_pokemon_gemma3")
    shown = dict.fromkeys(our_classes(*training.dataclass_types), "sft_pokemon_gemma3")
    yield from (", ".join(map(link_to, SCRIPTS)), "")
    for script, what in SCRIPTS.items():
        yield from (f"## {what}", "", f"`scripts/{script}.py`", "")
        if commands := getattr(importlib.import_module(f"scripts.{script}"), "COMMANDS", None):
            yield from command_sections(script, commands)
            continue
        parser = training if script == "sft_pokemon_gemma3" else parser_of(f"scripts.{script}")
        classes = our_classes(*parser.dataclass_types)
        new = [kind for kind in classes if shown.setdefault(kind, script) == script]
        yield from rows(parser, fields_of(new))
        if others := dict.fromkeys(shown[kind] for kind in classes if kind not in new):
            yield from (f"It also takes the options of {', '.join(map(link_to, others))}.", "")


def link_to(script: str) -> str:
    """Return a link to a script's section."""
    what = SCRIPTS[script]
    return f"[{what}](#{what.lower().replace(' ', '-').replace('.', '')})"


def command_sections(script: str, commands: dict[str, cli.Command]) -> Iterator[str]:
    """Yield the tables of a script with commands: first the options that all of them have."""
    parsers = {name: parser_of(f"scripts.{script}", name) for name in commands}
    fields = {name: fields_of(our_classes(*parser.dataclass_types)) for name, parser in parsers.items()}
    common = [name for name in next(iter(fields.values())) if all(name in names for names in fields.values())]
    yield from rows(next(iter(parsers.values())), common)
    for name, command in commands.items():
        words = " ".join((name, *map(str.upper, command.positional)))
        left = [field for field in fields[name] if field not in (*common, *command.positional)]
        yield from (f"**{words}**", "")
        if set(left) - set(IN_INTRODUCTION):
            yield from rows(parsers[name], left)


def write_page(text: str) -> str:
    """Return the page with a generated part that is up to date."""
    return text.partition(START)[0] + START + "\n" + "\n".join(sections()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
