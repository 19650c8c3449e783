"""Versions of a model: registered with origin, measurements and the hash of every file; promoted; exported.

A version is a model version of MLflow, with its facts as tags, and an MLflow run with its files (registry_files.py).
registration.py makes versions.
"""

import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError

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

from pokegemma.fingerprints import CARD_FILE
from pokegemma.outputs import RUN_FILE, atomic_folder, file_lock, refuse_to_replace
from pokegemma.provenance import read_run_record, write_run_record
from pokegemma.release import registry_files
from pokegemma.release.registration import Registration, make_version, read_submission, update_version
from pokegemma.release.registry_files import COPIES, describe_version, find_all

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class Registry:
    """The versions of one model, in a local SQLite file or on a tracking server.

    Processes that write to the same file wait for each other. On a server, two processes that register the same content
    at the same moment can make two versions of it.
    """

    def __init__(self, uri: str, name: str, *, create: bool = False) -> None:
        """Name a registry: a path, sqlite:///PATH, or http(s)://...; `create` makes a file that does not exist.

        Raises:
            PokegemmaError: the file does not exist, or `name` is not valid.
        """
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
        with self._plain_errors(), self._lock():
            client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_registered_models(max_results=1)
            return client

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        if self.file is None:
            return contextlib.nullcontext()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return file_lock(self.file.with_name(f".{self.file.name}.lock"))

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Report an error of MLflow, its database or the disk in one line."""
        try:
            yield
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise PokegemmaError(f"registry {self.uri}: {' '.join(str(error).split())[:300]}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[MlflowClient]:
        client = self.client  # before the lock, which it takes itself
        with self._plain_errors(), self._lock():
            yield client

    def versions(self) -> list[dict[str, Any]]:
        """Return `describe` of each version, the oldest first."""
        with self._plain_errors():
            found = find_all(self.client.search_model_versions, f"name = '{self.name}'")
            aliases = self.client.get_registered_model(self.name).aliases if found else {}
            return [describe_version(one, aliases) for one in sorted(found, key=lambda one: int(one.version))]

    def find(self, spec: str) -> ModelVersion:
        """Return a version by its number or an alias.

        Raises:
            PokegemmaError: there is no such version.
        """
        with self._plain_errors():
            try:
                if spec.isdecimal():
                    return self.client.get_model_version(self.name, spec)
                return self.client.get_model_version_by_alias(self.name, spec)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        existing = [f"{one['version']}{''.join(f' ({alias})' for alias in one['aliases'])}" for one in self.versions()]
        raise PokegemmaError(f"{self.name} has no version {spec!r}; it has {', '.join(existing) or 'none'}")

    def describe(self, spec: str) -> dict[str, Any]:
        """Return the facts of a version as JSON has them: aliases, hashes, origin, results; no files."""
        with self._plain_errors():
            return describe_version(self.find(spec), self.client.get_registered_model(self.name).aliases)

    def fetch(self, spec: str, name: str, folder: Path) -> Path | None:
        """Fetch a file of a version, such as "run.json", into `folder`; None if the version has none."""
        with self._plain_errors():
            return registry_files.fetch(self.client, self.find(spec), name, folder)

    def read_text(self, spec: str, name: str) -> str | None:
        """Return the text of a file of a version, such as "run.json"; None if the version has none."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.fetch(spec, name, Path(folder))
            return None if path is None else path.read_text(encoding="utf-8")

    def missing_parts(self, spec: str) -> list[str]:
        """Return the parts of a version (the model, exports) that were not copied and whose files are missing."""
        with self._plain_errors():
            parts = registry_files.read_manifest(self.client, self.find(spec)) or {}
        return [name for name, part in parts.items() if not registry_files.is_present(part)]

    def register(
        self,
        model_path: Path,
        *,
        evaluation: Path | None = None,
        parity: Path | None = None,
        exports: Sequence[Path] = (),
        copy: bool = False,
        description: str | None = None,
    ) -> Registration:
        """Make a version of a model's folder, unless a version has the same files.

        In that case, results and exports that differ from the version's replace them, and files that are missing at
        their registered place are from now on those of the given folders.

        Args:
            evaluation: the output of scripts/evaluate.py for this model.
            parity: the output of scripts/check_parity.py for it.
            exports: folders of exports, named by their last part.
            copy: keep a copy of all files; otherwise, the version only has their paths and hashes.

        Raises:
            PokegemmaError: a folder is not complete, or results are those of another model.
        """
        submission = read_submission(model_path, evaluation=evaluation, parity=parity, exports=exports, copy=copy)
        with self._writing() as client:
            if self.file is not None:
                registry_files.drop_killed_runs(client)
            query = f"name = '{self.name}' and tags.content_sha256 = '{submission.tags['content_sha256']}'"
            if known := find_all(client.search_model_versions, query):
                return update_version(client, min(known, key=lambda version: int(version.version)), submission)
            artifacts = self.file and self.file.parent / "artifacts"
            return make_version(client, self.name, submission, description=description, artifacts=artifacts)

    def _history(self, alias: str) -> list[int]:
        """Return the versions that an alias had before, the latest last."""
        return json.loads(self.client.get_registered_model(self.name).tags.get(f"history.{alias}", "[]"))

    def _write_history(self, alias: str, history: Sequence[int]) -> None:
        self.client.set_registered_model_tag(self.name, f"history.{alias}", json.dumps(list(history)))

    def promote(self, spec: str, alias: str, *, force: bool = False) -> tuple[int, int | None]:
        """Give an alias to a version; return its number and that of the version that had the alias before.

        Raises:
            PokegemmaError: there is no such version, or `alias` is not valid.
            CheckFailedError: its evaluation or its parity failed, and not `force`.
        """
        if not _NAME.fullmatch(alias) or alias.isdecimal():
            raise PokegemmaError(f"--alias {alias!r}: not a valid alias; use a word such as champion")
        with self._writing() as client:
            described = self.describe(spec)
            number, failed = described["version"], described["failed"]
            if failed and not force:
                reasons = "; ".join(failed.values())
                raise CheckFailedError(f"version {number} is not promoted: {reasons} (--force promotes it anyway)")
            before = client.get_registered_model(self.name).aliases.get(alias)
            before = None if before is None else int(before)
            if before not in (None, number):
                # The history first: if this process dies between the two, `rollback` skips what the alias still has.
                self._write_history(alias, [*self._history(alias), before])
            client.set_registered_model_alias(self.name, alias, str(number))
        return number, before

    def rollback(self, alias: str) -> tuple[int, int]:
        """Give an alias back to the version that had it before; return the numbers of that version and of the other.

        Raises:
            PokegemmaError: no version has the alias, or none had it before.
        """
        with self._writing() as client:
            current, history = int(self.find(alias).version), self._history(alias)
            while history and history[-1] == current:
                history.pop()
            if not history:
                raise PokegemmaError(f"{alias} is version {current} and was no other version before")
            earlier = history.pop()
            self.find(str(earlier))  # it may have been deleted
            client.set_registered_model_alias(self.name, alias, str(earlier))
            self._write_history(alias, history)
        return earlier, current

    def export(self, spec: str, output: Path, *, part: str = "model", overwrite: bool = False) -> int:
        """Write a version's model, or one of its exports, as a folder; return the version's number.

        Raises:
            PokegemmaError: there is no such version or part, or `output` cannot be written.
            CheckFailedError: a file is missing or changed since it was registered; nothing is left at `output`.
        """
        version = self.find(spec)
        with self._plain_errors():
            parts = registry_files.read_manifest(self.client, version)
        if parts is None:
            raise PokegemmaError(f"version {version.version} was not registered by this project: it has no manifest")
        if part not in parts:
            raise PokegemmaError(f"--part {part}: version {version.version} has {', '.join(parts)}")
        source = Path(parts[part]["path"])
        refuse_to_replace(output, source)
        if output.resolve().is_relative_to(source):
            raise PokegemmaError(f"--output_dir {output} is inside the registered folder {source}; choose another")
        number = str(version.version)
        with atomic_folder(output, stage="export", overwrite=overwrite) as folder:
            copies = self.fetch(number, f"{COPIES}/{part}", folder / ".copies") if parts[part]["copied"] else None
            registry_files.write_part(parts[part], folder, copies=copies)
            record: dict[str, Any] = {}
            if part == "model":
                for name in (RUN_FILE, CARD_FILE):
                    self.fetch(number, name, folder)
                record = read_run_record(folder) or {}
            write_run_record(
                folder,
                stage="export",
                options={"name": self.name, "version": int(number), "part": part},
                training=record.get("training") or record or None,
                exported=record or None,
            )
        return int(number)
