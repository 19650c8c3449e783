"""Keep versions of a model: register, list, show, check, promote, compare, rollback, export.

    python scripts/model_registry.py register --model_path outputs/merged --evaluation outputs/evaluation
    python scripts/model_registry.py promote 1 --alias champion
    python scripts/model_registry.py compare champion 2
    python scripts/model_registry.py check champion
    python scripts/model_registry.py rollback --alias champion
    python scripts/model_registry.py export champion --output_dir outputs/served

VERSION and OTHER are numbers or aliases. `check` exits 1 where results of a version failed, the others warn of it. The
registry is MLflow's, in outputs/registry/registry.db unless --registry_uri names another file or a tracking server.
Needs ./init.sh --with registry. Commands and their options:
"""

import json
import logging
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pokegemma.cli import Command, parse_command, run
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import atomic_file

if TYPE_CHECKING:
    from pokegemma.release.registry import Registry

DEFAULT_REGISTRY = "outputs/registry/registry.db"


@dataclass(kw_only=True)
class _Options:
    registry_uri: str = field(
        default=DEFAULT_REGISTRY, metadata={"help": "SQLite file (or sqlite:///FILE), or http(s)://... of a server."}
    )
    name: str = field(default="pokegemma", metadata={"help": "Name of the model."})


@dataclass(kw_only=True)
class RegisterOptions(_Options):
    model_path: str = field(metadata={"help": "Folder of the merged checkpoint."})
    evaluation: str | None = field(default=None, metadata={"help": "What scripts/evaluate.py wrote for it."})
    parity: str | None = field(default=None, metadata={"help": "What scripts/check_parity.py wrote for it."})
    exports: list[str] = field(default_factory=list, metadata={"help": "Folders of its exports."})
    copy: bool = field(default=False, metadata={"help": "Keep a copy of the files; default: where they lie."})
    description: str | None = field(default=None, metadata={"help": "A sentence about this version."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write name and version to."})


@dataclass(kw_only=True)
class ListOptions(_Options):
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


@dataclass(kw_only=True)
class ShowOptions(ListOptions):
    version: str = field(metadata={"help": "Number or alias."})


@dataclass(kw_only=True)
class CheckOptions(_Options):
    version: str = field(metadata={"help": "Number or alias."})


@dataclass(kw_only=True)
class PromoteOptions(_Options):
    version: str = field(metadata={"help": "Number or alias."})
    alias: str = field(default="champion", metadata={"help": "What to call it."})
    force: bool = field(default=False, metadata={"help": "Also where its evaluation or parity failed."})


@dataclass(kw_only=True)
class CompareOptions(ListOptions):
    version: str = field(metadata={"help": "Number or alias."})
    other: str = field(metadata={"help": "The same, of the version whose figures are subtracted from."})


@dataclass(kw_only=True)
class RollbackOptions(_Options):
    alias: str = field(default="champion", metadata={"help": "Which alias to give back."})


@dataclass(kw_only=True)
class ExportOptions(_Options):
    version: str = field(metadata={"help": "Number or alias."})
    output_dir: str = field(metadata={"help": "Folder to make."})
    part: str = field(default="model", metadata={"help": "model, or the name of an export's folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier export wrote."})


COMMANDS = {
    "register": Command(RegisterOptions),
    "list": Command(ListOptions),
    "show": Command(ShowOptions, ("version",)),
    "check": Command(CheckOptions, ("version",)),
    "promote": Command(PromoteOptions, ("version",)),
    "compare": Command(CompareOptions, ("version", "other")),
    "rollback": Command(RollbackOptions),
    "export": Command(ExportOptions, ("version",)),
}


def register(registry: "Registry", options: RegisterOptions) -> None:
    done = registry.register(
        Path(options.model_path),
        evaluation=Path(options.evaluation) if options.evaluation else None,
        parity=Path(options.parity) if options.parity else None,
        exports=[Path(folder) for folder in options.exports],
        copy=options.copy,
        description=options.description,
    )
    if options.output:
        try:
            with atomic_file(Path(options.output)) as temporary:
                temporary.write_text(json.dumps({"name": options.name, **asdict(done)}) + "\n", encoding="utf-8")
        except OSError as error:
            raise PokegemmaError(f"--output {options.output} cannot be written: {error.strerror}") from error
    if done.created:
        print(f"registered {options.model_path} as {options.name} version {done.version}")
        for missing in ("evaluation", "parity"):
            if getattr(options, missing) is None:
                print(f"warning: this version has no results of {missing}", file=sys.stderr)
    else:
        print(f"{options.name} version {done.version} has this content already; no other was made")
        for key in done.updated:
            print(f"  its results of {key} were replaced")
        for part in done.refiled:
            print(f"  its {part} is now that given here")
    _warn(registry.describe(str(done.version)))


def _title(described: dict[str, Any]) -> str:
    aliases = ", ".join(described["aliases"])
    return f"version {described['version']}" + (f" ({aliases})" if aliases else "")


def _warn(described: dict[str, Any]) -> None:
    for reason in described["failed"].values():
        print(f"warning: {_title(described)}: {reason}", file=sys.stderr)


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    evaluation, parity = one["evaluation"], one["parity"]
    note = " (failed)" if "evaluation" in one["failed"] else ""
    return (
        str(one["version"]),
        ", ".join(one["aliases"]) or "–",
        one["created"],
        f"{100 * evaluation['accuracy']:.1f} %{note}" if evaluation else "–",
        ("passed" if parity["passed"] else "failed") if parity else "–",
        *((one[key] or "–")[:12] for key in ("dataset_sha256", "content_sha256")),
        one["model_path"] or "–",
    )


def list_versions(registry: "Registry", options: ListOptions) -> None:
    versions = registry.versions()
    for one in versions:
        if one["aliases"]:  # somebody uses it; of the others the table tells
            _warn(one)
    if options.json:
        print(json.dumps(versions, indent=2))
        return
    lines = [("version", "aliases", "created", "accuracy", "parity", "trained on", "content", "path")]
    lines += [_row(one) for one in versions]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show(registry: "Registry", options: ShowOptions) -> None:
    described = registry.describe(options.version)
    _warn(described)
    with tempfile.TemporaryDirectory() as folder:
        path = registry.artifact(registry.find(options.version), "run.json", Path(folder))
        described["run"] = json.loads(path.read_text(encoding="utf-8")) if path else None
    if options.json:
        print(json.dumps(described, indent=2))
        return
    chain = described.pop("run") or {}
    del described["failed"]  # was said above
    for key, value in described.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {one}" for name, one in value.items() if not isinstance(one, list))
        print(f"{key:16}{', '.join(value) if isinstance(value, list) else value}")
    training = chain.get("training") or {}
    stages = [(chain.get("stage"), chain), *([(training.get("stage"), training)] if training else [])]
    for stage, record in stages:
        print(f"{stage or 'run':16}{record.get('created')}, commit {record.get('git_commit')}")


def check(registry: "Registry", options: CheckOptions) -> None:
    described = registry.describe(options.version)
    if failed := described["failed"]:
        raise CheckFailedError(f"{_title(described)}: {'; '.join(failed.values())}")
    found = (f"{key} {'passed' if described[key] else 'not measured'}" for key in ("evaluation", "parity"))
    print(f"{_title(described)}: {', '.join(found)}")


def compare(registry: "Registry", options: CompareOptions) -> None:
    from pokegemma.release import measurements

    specs = (options.version, options.other)
    compared = measurements.compare_versions(*(registry.describe(spec) for spec in specs))
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            registry.artifact(
                registry.find(spec), f"evaluation/{measurements.PREDICTIONS_FILE}", Path(folder, str(number))
            )
            for number, spec in enumerate(specs)
        ]
        if all(paths):
            compared["accuracy_difference_interval"] = measurements.paired_interval(
                *map(measurements.read_lines, paths)
            )
    for warning in compared["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(compared, indent=2) if options.json else measurements.format_comparison(compared))


def promote(registry: "Registry", options: PromoteOptions) -> None:
    number, before = registry.promote(options.version, options.alias, force=options.force)
    was = "" if before is None else ", as it was" if before == number else f", before it version {before}"
    print(f"{options.alias} is version {number}{was}")
    _warn(registry.describe(str(number)))


def rollback(registry: "Registry", options: RollbackOptions) -> None:
    earlier, left = registry.rollback(options.alias)
    print(f"{options.alias} is version {earlier} again, after version {left}")
    _warn(registry.describe(str(earlier)))


def export(registry: "Registry", options: ExportOptions) -> None:
    number = registry.export(options.version, Path(options.output_dir), part=options.part, overwrite=options.overwrite)
    print(f"{options.part} of {options.name} version {number} in {options.output_dir}, every file as registered")
    _warn(registry.describe(str(number)))


def main() -> None:
    name, options = parse_command(COMMANDS, description=__doc__)
    for chatty in ("mlflow", "alembic"):  # how they migrate a new database, a dozen lines
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from pokegemma.release.registry import Registry

    registry = Registry(options.registry_uri, options.name, create=name == "register")
    actions = (register, show, check, promote, compare, rollback, export)
    {"list": list_versions, **{action.__name__: action for action in actions}}[name](registry, options)


if __name__ == "__main__":
    run(main)
