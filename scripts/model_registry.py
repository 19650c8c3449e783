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
    CompareOptions,
    ExportOptions,
    ListOptions,
    PromoteOptions,
    RegisterOptions,
    RollbackOptions,
    ShowOptions,
    VersionOptions,
)

if TYPE_CHECKING:
    from pokegemma.release.registry import Registry


Versions = list[dict[str, Any]]
"""What a command returns: versions (of `Registry.describe`) that `main` warns about if results of theirs failed."""


def register(registry: "Registry", options: RegisterOptions) -> Versions:
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
    return [registry.describe(str(done.version))]


def list_versions(registry: "Registry", options: ListOptions) -> Versions:
    versions = registry.versions()
    print(json.dumps(versions, indent=2) if options.json else version_tables.format_versions(versions))
    return [described for described in versions if described["aliases"]]  # the table shows the failures of the others


def show(registry: "Registry", options: ShowOptions) -> Versions:
    described = registry.describe(options.version)
    run_record = json.loads(registry.read_text(options.version, RUN_FILE) or "null")
    if options.json:
        print(json.dumps({**described, "run": run_record}, indent=2))
    else:
        print(version_tables.format_version(described, run_record or {}))
    return [described]


def check(registry: "Registry", options: VersionOptions) -> Versions:
    described = registry.describe(options.version)
    title = version_tables.version_title(described)
    if failed := described["failed"]:
        raise CheckFailedError(f"{title}: {'; '.join(failed.values())}")
    found = (f"{key} {'passed' if described[key] else 'not measured'}" for key in ("evaluation", "parity"))
    print(f"{title}: {', '.join(found)}")
    return []


def compare(registry: "Registry", options: CompareOptions) -> Versions:
    specs = (options.version, options.other)
    compared = version_tables.compare_versions(*map(registry.describe, specs))
    predictions = [registry.read_text(spec, "evaluation/predictions.jsonl") for spec in specs]
    if None not in predictions:
        compared["accuracy_difference_interval"] = version_tables.paired_interval(*predictions)
    for warning in compared["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(compared, indent=2) if options.json else version_tables.format_comparison(compared))
    return []


def promote(registry: "Registry", options: PromoteOptions) -> Versions:
    number, before = registry.promote(options.version, options.alias, force=options.force)
    was = "" if before is None else ", as before" if before == number else f", before version {before}"
    print(f"{options.alias} is version {number}{was}")
    return [registry.describe(str(number))]


def rollback(registry: "Registry", options: RollbackOptions) -> Versions:
    earlier, left = registry.rollback(options.alias)
    print(f"{options.alias} is version {earlier} again, after version {left}")
    return [registry.describe(str(earlier))]


def export(registry: "Registry", options: ExportOptions) -> Versions:
    number = registry.export(options.version, Path(options.output_dir), part=options.part, overwrite=options.overwrite)
    print(f"{options.part} of {options.name} version {number} in {options.output_dir}, every file as registered")
    return [registry.describe(str(number))]


COMMANDS = {
    "register": Command(RegisterOptions, register),
    "list": Command(ListOptions, list_versions),
    "show": Command(ShowOptions, show, ("version",)),
    "check": Command(VersionOptions, check, ("version",)),
    "promote": Command(PromoteOptions, promote, ("version",)),
    "compare": Command(CompareOptions, compare, ("version", "other")),
    "rollback": Command(RollbackOptions, rollback),
    "export": Command(ExportOptions, export, ("version",)),
}


def main() -> None:
    name, options = parse_command(COMMANDS, description=__doc__)
    from pokegemma.release.registry import Registry

    registry = Registry(options.registry_uri, options.name, create=name == "register")
    for described in COMMANDS[name].action(registry, options):
        for reason in described["failed"].values():
            print(f"warning: {version_tables.version_title(described)}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
