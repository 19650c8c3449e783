"""Keep versions of a model: register, list, show, check, promote, compare, rollback, export.

    python scripts/model_registry.py register --model_path outputs/merged --evaluation outputs/evaluation
    python scripts/model_registry.py promote 1 --alias champion
    python scripts/model_registry.py compare champion 2
    python scripts/model_registry.py check champion
    python scripts/model_registry.py rollback --alias champion
    python scripts/model_registry.py export champion --output_dir outputs/served

VERSION and OTHER are numbers or aliases. If results of a version failed, `check` exits with 1 and the other commands
print a warning. The registry is MLflow's, in outputs/registry/registry.db unless --registry_uri names another file or a
tracking server. Needs ./init.sh --with registry. Commands and their options:
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pokegemma.cli import Command, parse_command, run
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.release import version_tables

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
    evaluation: str | None = field(default=None, metadata={"help": "Output of scripts/evaluate.py for it."})
    parity: str | None = field(default=None, metadata={"help": "Output of scripts/check_parity.py for it."})
    exports: list[str] = field(default_factory=list, metadata={"help": "Folders of its exports."})
    copy: bool = field(
        default=False, metadata={"help": "Keep a copy of the files. Default: only their paths and hashes."}
    )
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
    alias: str = field(default="champion", metadata={"help": "The alias."})
    force: bool = field(default=False, metadata={"help": "Promote it even if its evaluation or parity failed."})


@dataclass(kw_only=True)
class CompareOptions(ListOptions):
    version: str = field(metadata={"help": "Number or alias."})
    other: str = field(metadata={"help": "Number or alias; the table shows its figures minus those of VERSION."})


@dataclass(kw_only=True)
class RollbackOptions(_Options):
    alias: str = field(default="champion", metadata={"help": "The alias."})


@dataclass(kw_only=True)
class ExportOptions(_Options):
    version: str = field(metadata={"help": "Number or alias."})
    output_dir: str = field(metadata={"help": "Folder to create."})
    part: str = field(default="model", metadata={"help": "model, or the name of an export's folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output of an earlier export."})


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
        print(f"{options.name} version {done.version} has this content already; no new version was made")
        for key in done.updated:
            print(f"  its results of {key} were replaced")
        for part in done.refiled:
            print(f"  its {part} is now the one given here")
    _warn(registry.describe(str(done.version)))


def _warn(described: dict[str, Any]) -> None:
    for reason in described["failed"].values():
        print(f"warning: {version_tables.version_title(described)}: {reason}", file=sys.stderr)


def list_versions(registry: "Registry", options: ListOptions) -> None:
    versions = registry.versions()
    for described in versions:
        if described["aliases"]:  # it is in use; the table shows the failures of the others
            _warn(described)
    print(json.dumps(versions, indent=2) if options.json else version_tables.format_versions(versions))


def show(registry: "Registry", options: ShowOptions) -> None:
    described = registry.describe(options.version)
    _warn(described)
    with tempfile.TemporaryDirectory() as folder:
        path = registry.fetch(options.version, "run.json", Path(folder))
        run_record = json.loads(path.read_text(encoding="utf-8")) if path else None
    if options.json:
        print(json.dumps({**described, "run": run_record}, indent=2))
        return
    del described["failed"]  # printed above
    print(version_tables.format_version(described, run_record or {}))


def check(registry: "Registry", options: CheckOptions) -> None:
    described = registry.describe(options.version)
    title = version_tables.version_title(described)
    if failed := described["failed"]:
        raise CheckFailedError(f"{title}: {'; '.join(failed.values())}")
    found = (f"{key} {'passed' if described[key] else 'not measured'}" for key in ("evaluation", "parity"))
    print(f"{title}: {', '.join(found)}")


def compare(registry: "Registry", options: CompareOptions) -> None:
    specs = (options.version, options.other)
    compared = version_tables.compare_versions(*(registry.describe(spec) for spec in specs))
    file = f"evaluation/{version_tables.PREDICTIONS_FILE}"
    with tempfile.TemporaryDirectory() as folder:
        paths = [registry.fetch(spec, file, Path(folder, str(number))) for number, spec in enumerate(specs)]
        if all(paths):
            predictions = map(version_tables.read_predictions, paths)
            compared["accuracy_difference_interval"] = version_tables.paired_interval(*predictions)
    for warning in compared["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(compared, indent=2) if options.json else version_tables.format_comparison(compared))


def promote(registry: "Registry", options: PromoteOptions) -> None:
    number, before = registry.promote(options.version, options.alias, force=options.force)
    was = "" if before is None else ", as before" if before == number else f", before version {before}"
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
ACTIONS = {
    "register": register,
    "list": list_versions,
    "show": show,
    "check": check,
    "promote": promote,
    "compare": compare,
    "rollback": rollback,
    "export": export,
}


def main() -> None:
    name, options = parse_command(COMMANDS, description=__doc__)
    from pokegemma.release.registry import Registry

    ACTIONS[name](Registry(options.registry_uri, options.name, create=name == "register"), options)


if __name__ == "__main__":
    run(main)
