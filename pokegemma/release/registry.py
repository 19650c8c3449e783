"""Versions of a model: each with its origin, its measurements and the hash of every file.

A version is an MLflow run, which holds the records as artifacts, and a model version that points to them. The version
is made last, with all its tags at once: what was killed before leaves a run that no version names, and the next
registration removes it.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder, require_unchanged
from pokegemma.outputs import RUN_FILE, atomic_folder, refuse_to_replace
from pokegemma.provenance import read_run_record, write_run_record
from pokegemma.release.measurements import Results, read_results
from pokegemma.release.registry_store import COPIES, MANIFEST_FILE, NAME, ModelVersion, RegistryRuns, find_all


@dataclass(frozen=True)
class Registered:
    """`created` is False where this content was there already; `updated` names the results that were replaced then,
    `refiled` the parts (the model, exports) that are now taken from the folders given.
    """

    version: int
    created: bool
    updated: tuple[str, ...] = ()
    refiled: tuple[str, ...] = ()


class Registry(RegistryRuns):
    """What is done with versions. On a server, two processes that register the same content at the same moment can make
    two versions of it.
    """

    # --- registering

    def register(
        self,
        model_path: Path,
        *,
        evaluation: Path | None = None,
        parity: Path | None = None,
        exports: Sequence[Path] = (),
        copy: bool = False,
        description: str | None = None,
    ) -> Registered:
        """Make a version of a model's folder, unless there is one with the same files.

        Of a model that is known, results and exports that differ from its version's replace them, and files that are
        no longer where that version has them are from now on taken from here.

        Args:
            evaluation: what scripts/evaluate.py wrote for this model.
            parity: what scripts/check_parity.py wrote for it.
            exports: folders of exports, named by their last part.
            copy: keep a copy of all files; else the version knows where they lie and what they hold.

        Raises:
            PokegemmaError: a folder is not what it should be, or results are those of another model.
        """
        if not (model_path / "config.json").is_file() or not list(model_path.glob("*.safetensors")):
            raise PokegemmaError(f"{model_path}: no model (config.json and *.safetensors); register a merged one")
        record = read_run_record(model_path)
        if record is None:
            raise PokegemmaError(f"{model_path}/{RUN_FILE} not found: a version must say how it was made")
        results = read_results(model_path, record, evaluation=evaluation, parity=parity)
        folders = {"model": model_path, **{path.name: path for path in exports}}
        if len(folders) != 1 + len(exports):
            raise PokegemmaError("--exports: two folders have the same name, or one is called model")
        hashes = FileHashes()
        parts = {
            part: {"path": str(path.resolve()), "files": hash_folder(path, hashes), "copied": copy}
            for part, path in folders.items()
        }
        content = content_hash(parts["model"]["files"])
        training = record.get("training") or record
        tags = {
            "content_sha256": content,
            "dataset_sha256": (training.get("dataset") or {}).get("sha256", "unknown"),
            "git_commit": record.get("git_commit") or "unknown",
            "model_path": str(model_path.resolve()),
            "copied": str(copy).lower(),
            **{key: json.dumps(summary) for key, summary in results.summaries.items()},
        }
        client = self.client
        with self.lock(), self.plain_errors():
            self.drop_killed_runs()
            query = f"name = '{self.name}' and tags.content_sha256 = '{content}'"
            if known := find_all(client.search_model_versions, query):
                version = min(known, key=lambda one: int(one.version))
                refiled = self._refile(version, parts, copy=copy)
                updated = self._update(version, results)
                if (refiled or updated) and (model_path / CARD_FILE).is_file():
                    client.log_artifact(version.run_id, str(model_path / CARD_FILE))
                return Registered(int(version.version), created=False, updated=updated, refiled=refiled)
            run_id = self.start_run(content)
            with contextlib.ExitStack() as undo:
                undo.callback(self.settle_run, run_id)
                self.log_manifest(run_id, parts)
                for file in (RUN_FILE, CARD_FILE):
                    if (model_path / file).is_file():
                        client.log_artifact(run_id, str(model_path / file))
                self.log_results(run_id, results)
                if copy:
                    self.copy_parts(run_id, parts)
                source = client.get_run(run_id).info.artifact_uri
                if not find_all(client.search_registered_models, f"name = '{self.name}'"):
                    client.create_registered_model(self.name)
                version = client.create_model_version(self.name, source, run_id, tags=tags, description=description)
                undo.pop_all()
            client.set_terminated(run_id)
        return Registered(int(version.version), created=True)

    def _refile(self, version: ModelVersion, parts: Mapping[str, Mapping[str, Any]], *, copy: bool) -> tuple[str, ...]:
        """Take parts that are new, other than before, gone from their place or not yet copied; return their names."""
        known = self.read_manifest(version) or {}
        taken = {
            name: part
            for name, part in parts.items()
            if name not in known
            or known[name]["files"] != part["files"]
            or (copy and not known[name]["copied"])
            or not (known[name]["copied"] or is_present(known[name]))
        }
        if not taken:
            return ()
        copy = copy or version.tags.get("copied") == "true"
        taken = {name: {**part, "copied": copy} for name, part in taken.items()}
        if copy:
            self.copy_parts(version.run_id, taken)
        facts = {"copied": str(copy).lower()}
        if "model" in taken:
            facts["model_path"] = taken["model"]["path"]
        for key, value in facts.items():
            self.client.set_model_version_tag(self.name, version.version, key, value)
        # The manifest last: as long as it is the old one, the next registration does all of this again.
        self.log_manifest(version.run_id, {**known, **taken})
        return tuple(taken)

    def _update(self, version: ModelVersion, results: Results) -> tuple[str, ...]:
        new = {key: json.dumps(value) for key, value in results.summaries.items()}
        changed = tuple(key for key, value in new.items() if version.tags.get(key) != value)
        if changed:
            self.log_results(version.run_id, results)
            for key in changed:
                self.client.set_model_version_tag(self.name, version.version, key, new[key])
        return changed

    # --- aliases

    def _history(self, alias: str) -> list[int]:
        """Return the versions that an alias had before, the latest last."""
        tags = self.client.get_registered_model(self.name).tags
        return json.loads(tags.get(f"history.{alias}", "[]"))

    def _current(self, alias: str) -> int | None:
        number = self.client.get_registered_model(self.name).aliases.get(alias)
        return None if number is None else int(number)

    def promote(self, spec: str, alias: str, *, force: bool = False) -> tuple[int, int | None]:
        """Give an alias to a version; return its number and that of the version which had the alias before.

        Raises:
            PokegemmaError: there is no such version, or `alias` cannot be one.
            CheckFailedError: its evaluation or its parity failed, and not `force`.
        """
        if not NAME.fullmatch(alias) or alias.isdecimal():
            raise PokegemmaError(f"--alias: {alias!r} is no alias; take a word such as champion")
        self.find(spec)  # connects; says where there is none
        with self.lock(), self.plain_errors():
            described = self.describe(spec)  # under the lock, so that results registered meanwhile count
            number, failed = described["version"], described["failed"]
            if failed and not force:
                reasons = "; ".join(failed.values())
                raise CheckFailedError(f"version {number} is not promoted: {reasons} (--force does it anyway)")
            before = self._current(alias)
            if before is not None and before != number:
                # The history first: if this process dies between the two, `rollback` skips what the alias still has.
                self._write_history(alias, [*self._history(alias), before])
            self.client.set_registered_model_alias(self.name, alias, str(number))
        return number, before

    def _write_history(self, alias: str, history: Sequence[int]) -> None:
        self.client.set_registered_model_tag(self.name, f"history.{alias}", json.dumps(list(history)))

    def rollback(self, alias: str) -> tuple[int, int]:
        """Give an alias back to the version that had it before; return the numbers of (that one, the one it left).

        Raises:
            PokegemmaError: no version has the alias, or none had it before.
        """
        self.find(alias)  # connects; says where there is none
        with self.lock(), self.plain_errors():
            current = int(self.find(alias).version)
            history = self._history(alias)
            while history and history[-1] == current:
                history.pop()
            if not history:
                raise PokegemmaError(f"{alias} is at version {current} and had no other before: nothing to go back to")
            earlier = history.pop()
            self.find(str(earlier))  # somebody may have deleted it
            self.client.set_registered_model_alias(self.name, alias, str(earlier))
            self._write_history(alias, history)
        return earlier, current

    # --- out again

    def missing_parts(self, spec: str) -> list[str]:
        """Return the parts of a version (the model, exports) whose files are no longer there to be given out."""
        parts = self.read_manifest(self.find(spec)) or {}
        return [name for name, part in parts.items() if not (part["copied"] or is_present(part))]

    def export(self, spec: str, output: Path, *, part: str = "model", overwrite: bool = False) -> int:
        """Write a version's model, or one of its exports, as a folder; return the version's number.

        Every file is compared with the hash it was registered with, after copying.

        Raises:
            PokegemmaError: there is no such version or part, or `output` may not be written.
            CheckFailedError: a file is missing or changed; nothing is left at `output`.
        """
        version = self.find(spec)
        parts = self.read_manifest(version)
        if parts is None:
            raise PokegemmaError(f"version {version.version} has no {MANIFEST_FILE}: not of this project")
        if part not in parts:
            raise PokegemmaError(f"--part: version {version.version} has no {part!r}; it has {', '.join(parts)}")
        source, files = Path(parts[part]["path"]), parts[part]["files"]
        refuse_to_replace(output, source)
        if output.resolve().is_relative_to(source):
            raise PokegemmaError(f"--output_dir {output} is inside the registered folder {source}; choose another")
        with atomic_folder(output, stage="export", overwrite=overwrite) as folder:
            fetched = folder / ".fetched"
            if parts[part]["copied"]:
                fetched.mkdir()
                source = self.artifact(version, f"{COPIES}/{part}", fetched) or source
            check_present(source, files)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if fetched.exists():
                    (source / name).rename(folder / name)
                else:
                    shutil.copyfile(source / name, folder / name)
            shutil.rmtree(fetched, ignore_errors=True)
            require_unchanged(folder, files, FileHashes(), called=source)
            record: dict[str, Any] = {}
            if part == "model":
                for name in (RUN_FILE, CARD_FILE):
                    self.artifact(version, name, folder)
                record = read_run_record(folder) or {}
            write_run_record(
                folder,
                stage="export",
                options={"name": self.name, "version": int(version.version), "part": part},
                training=record.get("training") or record or None,
                exported=record or None,
            )
        return int(version.version)


def is_present(part: Mapping[str, Any]) -> bool:
    """Return whether every file of a part is where it was registered, of the same size."""
    files = {Path(part["path"], name): file["size"] for name, file in part["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def check_present(source: Path, files: Mapping[str, Any]) -> None:
    """Raise CheckFailedError where a registered file is gone, before anything is copied."""
    missing = [name for name in files if not (source / name).is_file()]
    if missing:
        raise CheckFailedError(f"{source}: {len(missing)} of {len(files)} registered files are gone ({missing[0]} ...)")
