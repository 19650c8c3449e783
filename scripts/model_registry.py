"""Keep versions of a model: register, list, show, check, promote, compare, rollback, export.

    python scripts/model_registry.py register --model_path outputs/merged --evaluation outputs/evaluation
    python scripts/model_registry.py promote 1 --alias champion
    python scripts/model_registry.py compare champion 2
    python scripts/model_registry.py check champion
    python scripts/model_registry.py rollback --alias champion
    python scripts/model_registry.py export champion --output_dir outputs/served

VERSION and OTHER are numbers, aliases or latest. If results of a version failed, `check` exits with 1 and the other
commands print a warning. The registry is MLflow's, in outputs/registry/registry.db unless --registry_uri names another
file or a tracking server. Needs ./init.sh --with registry. Commands and their options:
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pokegemma.cli import Command, parse_command, run
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_file
from pokegemma.release import version_tables
from pokegemma.release.options import (
    CheckOptions,
    CompareOptions,
    ExportOptions,
    ListOptions,
    PromoteOptions,
    RegisterOptions,
    RollbackOptions,
    ShowOptions,
)

if TYPE_CHECKING:
    from pokegemma.release.registry import Registry


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
    text = registry.read_text(options.version, RUN_FILE)
    run_record = None if text is None else json.loads(text)
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
    texts = [registry.read_text(spec, f"evaluation/{version_tables.PREDICTIONS_FILE}") for spec in specs]
    if None not in texts:
        predictions = map(version_tables.parse_predictions, texts)
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
    "register": Command(RegisterOptions, register),
    "list": Command(ListOptions, list_versions),
    "show": Command(ShowOptions, show, ("version",)),
    "check": Command(CheckOptions, check, ("version",)),
    "promote": Command(PromoteOptions, promote, ("version",)),
    "compare": Command(CompareOptions, compare, ("version", "other")),
    "rollback": Command(RollbackOptions, rollback),
    "export": Command(ExportOptions, export, ("version",)),
}


def main() -> None:
    name, options = parse_command(COMMANDS, description=__doc__)
    from pokegemma.release.registry import Registry

    COMMANDS[name].action(Registry(options.registry_uri, options.name, create=name == "register"), options)


if __name__ == "__main__":
    run(main)
