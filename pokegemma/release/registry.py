"""Versions of a model in MLflow's registry: found, promoted, exported. registration.py makes them."""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError, one_line

# Read by mlflow when it is imported. It would ask for telemetry settings over the network, and try for minutes to reach
# a server that does not answer.
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true")
os.environ.update(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false", MLFLOW_CONFIGURE_LOGGING="false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

try:
    import alembic  # noqa: F401
    import sqlalchemy
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise PokegemmaError(f"the registry needs {error.name}: ./init.sh --with registry") from error

from pokegemma.fingerprints import CARD_FILE, FileHashes, require_unchanged
from pokegemma.outputs import RUN_FILE, atomic_folder, file_lock, refuse_to_replace
from pokegemma.provenance import read_run_record, write_run_record
from pokegemma.release import registration
from pokegemma.release.measurements import failures
from pokegemma.release.registration import COPIES, MANIFEST_FILE, Parts, Registration, find_all

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class Registry:
    """The versions of one model, in a local SQLite file or on a tracking server.

    Processes that write to the same file wait for each other. On a server, two processes that register the same content
    at the same moment can make two versions of it. A `spec` is the number of a version or an alias.
    """

    def __init__(self, uri: str, name: str, *, create: bool = False) -> None:
        """Name a registry: a path, sqlite:///PATH, or http(s)://...; `create` makes a file that does not exist."""
        if not _NAME.fullmatch(name):
            raise PokegemmaError(f"--name {name!r}: not a valid name; use letters, digits, '.', '_' and '-'")
        self.name, self.uri = name, uri
        self.file: Path | None = None
        if uri.startswith("sqlite:///") or "://" not in uri:
            self.file = Path(uri.removeprefix("sqlite:///")).resolve()  # the same lock for every link to the file
            self.uri = f"sqlite:///{self.file}"
            if not self.file.is_file() and not create:
                raise PokegemmaError(f"{self.file}: no such registry; `register` makes one")

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, connected; the first connection to a file makes its tables."""
        with self._lock():
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_registered_models(max_results=1)
            return client

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        if self.file is None:
            return contextlib.nullcontext()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return file_lock(self.file.with_name(f".{self.file.name}.lock"))

    @contextlib.contextmanager
    def _access(self, *, writing: bool = False) -> Iterator[MlflowClient]:
        """Report an error of MLflow, its database or the disk in one line; have the lock of a file while writing."""
        try:
            client = self.client  # connected before the lock, which it takes itself
            with self._lock() if writing else contextlib.nullcontext():
                yield client
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise PokegemmaError(f"registry {self.uri}: {one_line(error, length=300)}") from error

    def versions(self) -> list[dict[str, Any]]:
        """Return `describe` of each version, the oldest first."""
        with self._access() as client:
            found = find_all(client.search_model_versions, f"name = '{self.name}'")
            aliases = client.get_registered_model(self.name).aliases if found else {}
        return [_describe(version, aliases) for version in sorted(found, key=lambda version: int(version.version))]

    def find(self, spec: str) -> ModelVersion:
        """Return MLflow's record of a version."""
        with self._access() as client:
            find = client.get_model_version if spec.isdecimal() else client.get_model_version_by_alias
            try:
                return find(self.name, spec)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        existing = [f"{one['version']}{''.join(f' ({alias})' for alias in one['aliases'])}" for one in self.versions()]
        raise PokegemmaError(f"{self.name} has no version {spec!r}; it has {', '.join(existing) or 'none'}")

    def describe(self, spec: str) -> dict[str, Any]:
        """Return the facts of a version as JSON has them: aliases, hashes, origin, results; no files."""
        with self._access() as client:
            return _describe(self.find(spec), client.get_registered_model(self.name).aliases)

    def fetch(self, spec: str, name: str, folder: Path) -> Path | None:
        """Fetch a file of a version, such as "run.json", or a folder of files; None if the version has none."""
        run_id, parent = self.find(spec).run_id, str(Path(name).parent).strip(".")
        with self._access() as client:  # a version that was not made by this project may have no run
            if run_id and name in {file.path for file in client.list_artifacts(run_id, parent)}:
                return Path(client.download_artifacts(run_id, name, str(folder)))
        return None

    def read_text(self, spec: str, name: str) -> str | None:
        """Return the text of a file of a version; None if the version has none."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.fetch(spec, name, Path(folder))
            return None if path is None else path.read_text(encoding="utf-8")

    def _parts(self, spec: str) -> Parts:
        return json.loads(self.read_text(spec, MANIFEST_FILE) or '{"parts": {}}')["parts"]

    def missing_parts(self, spec: str) -> list[str]:
        """Return the parts of a version (the model, exports) that were not copied and whose files are missing."""
        return [name for name, part in self._parts(spec).items() if not registration.is_present(part)]

    def register(self, model_path: Path, *, description: str | None = None, **folders: Any) -> Registration:
        """Make a version of a model's folder, unless a version has the same files; `folders`: see `read_submission`.

        In that case, results and exports that differ from the version's replace them, and files that are missing at
        their registered place are from now on those of the given folders.
        """
        new = registration.read_submission(model_path, **folders)
        with self._access(writing=True) as client:
            experiment = registration.open_experiment(client, self.file and self.file.parent / "artifacts")
            query = f"name = '{self.name}' and tags.content_sha256 = '{new.tags['content_sha256']}'"
            if same := find_all(client.search_model_versions, query):
                version = min(same, key=lambda version: int(version.version))
                return registration.update_version(client, version, self._parts(str(version.version)), new)
            options = {"experiment": experiment, "description": description, "is_local": self.file is not None}
            return registration.make_version(client, self.name, new, **options)

    def _history(self, alias: str) -> list[int]:
        """Return the versions that an alias had before, the latest last."""
        return json.loads(self.client.get_registered_model(self.name).tags.get(f"history.{alias}", "[]"))

    def promote(self, spec: str, alias: str, *, force: bool = False) -> tuple[int, int | None]:
        """Give an alias to a version; return its number and that of the version that had the alias before.

        Raises:
            CheckFailedError: its evaluation or its parity failed, and not `force`.
        """
        if not _NAME.fullmatch(alias) or alias.isdecimal():
            raise PokegemmaError(f"--alias {alias!r}: not a valid alias; use a word such as champion")
        with self._access(writing=True) as client:
            described = self.describe(spec)
            number, failed = described["version"], described["failed"]
            if failed and not force:
                reasons = "; ".join(failed.values())
                raise CheckFailedError(f"version {number} is not promoted: {reasons} (--force promotes it anyway)")
            before = client.get_registered_model(self.name).aliases.get(alias)
            before = None if before is None else int(before)
            if before not in (None, number):
                # The history first: if this process dies between the two, `rollback` skips what the alias still has.
                history = json.dumps([*self._history(alias), before])
                client.set_registered_model_tag(self.name, f"history.{alias}", history)
            client.set_registered_model_alias(self.name, alias, str(number))
        return number, before

    def rollback(self, alias: str) -> tuple[int, int]:
        """Give an alias back to the version that had it before; return the numbers of that version and of the other."""
        with self._access(writing=True) as client:
            current, history = int(self.find(alias).version), self._history(alias)
            while history and history[-1] == current:
                history.pop()
            if not history:
                raise PokegemmaError(f"{alias} is version {current} and was no other version before")
            earlier = history.pop()
            self.find(str(earlier))  # it may have been deleted
            client.set_registered_model_alias(self.name, alias, str(earlier))
            client.set_registered_model_tag(self.name, f"history.{alias}", json.dumps(history))
        return earlier, current

    def export(self, spec: str, output: Path, *, part: str = "model", overwrite: bool = False) -> int:
        """Write a version's model, or one of its exports, as a folder; return the version's number.

        Raises:
            CheckFailedError: a file is missing or changed since it was registered; nothing is left at `output`.
        """
        number = str(self.find(spec).version)  # an alias may move meanwhile
        parts = self._parts(number)
        if not parts:
            raise PokegemmaError(f"version {number} was not registered by this project: it has no manifest")
        if part not in parts:
            raise PokegemmaError(f"--part {part}: version {number} has {', '.join(parts)}")
        source = Path(parts[part]["path"])
        refuse_to_replace(output, source)
        if output.resolve().is_relative_to(source):
            raise PokegemmaError(f"--output_dir {output} is inside the registered folder {source}; choose another")
        with atomic_folder(output, stage="export", overwrite=overwrite) as folder:
            self._write_part(number, part, parts[part], folder)
            record: dict[str, Any] = {}
            if part == "model":
                for name in (RUN_FILE, CARD_FILE):
                    self.fetch(number, name, folder)
                record = read_run_record(folder) or {}
            options = {"name": self.name, "version": int(number), "part": part}
            training = record.get("training") or record or None
            write_run_record(folder, stage="export", options=options, training=training, exported=record or None)
        return int(number)

    def _write_part(self, number: str, name: str, part: Mapping[str, Any], folder: Path) -> None:
        """Write the files of a part, from the copy if there is one, and compare them with their registered hashes."""
        files = part["files"]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            copies = self.fetch(number, f"{COPIES}/{name}", Path(temporary)) if part["copied"] else None
            source, put = (copies, shutil.move) if copies else (Path(part["path"]), shutil.copyfile)
            if missing := [file for file in files if not (source / file).is_file()]:
                message = f"{len(missing)} of {len(files)} registered files are missing ({missing[0]})"
                raise CheckFailedError(f"{source}: {message}")
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                put(source / file, folder / file)
        require_unchanged(folder, files, FileHashes(), called=source)


def _describe(version: ModelVersion, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of a version; `aliases`: the version of each alias."""
    evaluation, parity = (json.loads(version.tags.get(key, "null")) for key in ("evaluation", "parity"))
    return {
        "name": version.name,
        "version": int(version.version),
        "aliases": sorted(alias for alias, number in aliases.items() if int(number) == int(version.version)),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(version.creation_timestamp / 1000)),
        "description": version.description or None,
        **{key: version.tags.get(key) for key in ("content_sha256", "dataset_sha256", "model_path")},
        "copied": version.tags.get("copied") == "true",
        "git_commit": version.tags.get("git_commit"),
        "evaluation": evaluation,
        "parity": parity,
        "failed": failures(evaluation, parity),
    }
