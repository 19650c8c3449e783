"""Versions of a model in MLflow's registry: each with its origin, its measurements and the hash of every file.

A version is an MLflow run, which holds the records as artifacts, and a model version that points to them. The version
is made last, with all its tags at once: what was interrupted before leaves a run that no version names.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by mlflow when it is imported. It would ask for telemetry settings over the network, and try for minutes to reach
# a server that is not there.
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true")
os.environ.update(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false", MLFLOW_CONFIGURE_LOGGING="false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

try:
    import alembic  # noqa: F401
    import mlflow
    import sqlalchemy
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException
except ImportError as error:
    from pokegemma.errors import PokegemmaError

    raise PokegemmaError(f"the registry needs {error.name}: ./init.sh --with registry") from error

from pokegemma.deploy.content import CARD_FILE, FileHashes, check_files, content_hash, hash_folder
from pokegemma.deploy.results import Results, read_results, refusals
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_folder
from pokegemma.provenance import read_run_record, write_run_record

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_EXPERIMENT = "pokegemma"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_COPIES = "files"


@dataclass(frozen=True)
class Registered:
    """`created` is False where this content was there already; `updated` names the results that were replaced then,
    `refiled` the parts (the model, exports) that are now taken from the folders given.
    """

    version: int
    created: bool
    updated: tuple[str, ...] = ()
    refiled: tuple[str, ...] = ()


class Registry:
    """The versions of one model, in a local SQLite file or on a tracking server.

    Processes that write to the same file wait for each other. On a server, two that register the same content at the
    same moment can make two versions of it.
    """

    def __init__(self, uri: str, name: str, *, create: bool = False) -> None:
        """Name a registry: a path, sqlite:///PATH, or http(s)://...; `create`: make the file where there is none.

        Raises:
            PokegemmaError: there is none, or `name` is no name. One that cannot be opened is an error of every method.
        """
        if not _NAME.fullmatch(name):
            raise PokegemmaError(f"--name: {name!r} is no name of a model; take letters, digits, '.', '_' and '-'")
        self.name, self.uri = name, uri
        self.file: Path | None = None
        if uri.startswith("sqlite:///") or "://" not in uri:
            self.file = Path(uri.removeprefix("sqlite:///")).absolute()
            self.uri = f"sqlite:///{self.file}"
            if not self.file.is_file() and not create:
                raise PokegemmaError(f"{self.file}: no registry there; `register` makes one")

    @functools.cached_property
    def client(self) -> mlflow.MlflowClient:
        """MLflow's client, connected. Ask for it before taking the lock: the first to open a file makes the tables."""
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PokegemmaError(f"registry {self.file} cannot be made: {error.strerror}") from error
        with self._lock(), self._plain_errors():
            client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_registered_models(max_results=1)
            return client

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if self.file is None:
            yield
            return
        try:
            lock = open(self.file.with_name(f".{self.file.name}.lock"), "w")  # noqa: SIM115
        except OSError as error:
            raise PokegemmaError(f"registry {self.file} cannot be locked: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
            message = " ".join(str(error).split())
            raise PokegemmaError(f"registry {self.uri}: {message[:300]}") from error

    # --- reading

    def versions(self) -> list[dict[str, Any]]:
        """Return what `describe` says of each version, the first one first."""
        with self._plain_errors():
            found = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
            return [self._describe(version) for version in sorted(found, key=lambda one: int(one.version))]

    def find(self, spec: str) -> ModelVersion:
        """Return a version by its number or an alias.

        Raises:
            PokegemmaError: there is none.
        """
        with self._plain_errors():
            try:
                if spec.isdecimal():
                    return self.client.get_model_version(self.name, spec)
                return self.client.get_model_version_by_alias(self.name, spec)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        there = [f"{one['version']}{''.join(f' ({alias})' for alias in one['aliases'])}" for one in self.versions()]
        raise PokegemmaError(f"{self.name} has no version {spec!r}; it has {', '.join(there) or 'none'}")

    def describe(self, spec: str) -> dict[str, Any]:
        """Return what is known of a version, ready for JSON: aliases, hashes, origin, results; no artifacts."""
        with self._plain_errors():
            return self._describe(self.find(spec))

    def _describe(self, version: ModelVersion) -> dict[str, Any]:
        aliases = self.client.get_registered_model(self.name).aliases
        tags = version.tags
        return {
            "name": self.name,
            "version": int(version.version),
            "aliases": sorted(alias for alias, number in aliases.items() if int(number) == int(version.version)),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(version.creation_timestamp / 1000)),
            "description": version.description or None,
            "content_sha256": tags.get("content_sha256"),
            "dataset_sha256": tags.get("dataset_sha256"),
            "model_path": tags.get("model_path"),
            "copied": tags.get("copied") == "true",
            "git_commit": tags.get("git_commit"),
            "evaluation": json.loads(tags.get("evaluation", "null")),
            "parity": json.loads(tags.get("parity", "null")),
        }

    def artifact(self, version: ModelVersion, path: str, folder: Path) -> Path | None:
        """Fetch an artifact (a file, or a folder with what is in it) into `folder`; None where there is none."""
        with self._plain_errors():
            parent = str(Path(path).parent)
            if path not in {file.path for file in self.client.list_artifacts(version.run_id, parent.strip("."))}:
                return None
            return Path(self.client.download_artifacts(version.run_id, path, str(folder)))

    def missing_parts(self, spec: str) -> list[str]:
        """Return the parts of a version (the model, exports) whose files are no longer there to be given out."""
        version = self.find(spec)
        if version.tags.get("copied") == "true":
            return []
        return [name for name, part in (self._read_manifest(version) or {}).items() if not is_present(part)]

    # --- registering

    def register(
        self, model_path: Path, *, evaluation: Path | None = None, parity: Path | None = None,
        exports: Sequence[Path] = (), copy: bool = False, description: str | None = None,
    ) -> Registered:  # fmt: skip
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
            part: {"path": str(path.resolve()), "files": hash_folder(path, hashes)} for part, path in folders.items()
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
        with self._lock(), self._plain_errors():
            query = f"name = '{self.name}' and tags.content_sha256 = '{content}'"
            if known := client.search_model_versions(query):
                version = min(known, key=lambda one: int(one.version))
                refiled = self._refile(version, folders, parts, copy=copy)
                updated = self._update(version, results)
                if (refiled or updated) and (model_path / CARD_FILE).is_file():
                    client.log_artifact(version.run_id, str(model_path / CARD_FILE))
                return Registered(int(version.version), created=False, updated=updated, refiled=refiled)
            run_id = self._start_run()
            with contextlib.ExitStack() as undo:
                undo.callback(self._drop_run, run_id)
                self._log_manifest(run_id, parts)
                for file in (RUN_FILE, CARD_FILE):
                    if (model_path / file).is_file():
                        client.log_artifact(run_id, str(model_path / file))
                self._log_results(run_id, results)
                if copy:
                    self._copy(run_id, folders, parts)
                source = client.get_run(run_id).info.artifact_uri
                if not client.search_registered_models(f"name = '{self.name}'"):
                    client.create_registered_model(self.name)
                version = client.create_model_version(self.name, source, run_id, tags=tags, description=description)
                undo.pop_all()
            client.set_terminated(run_id)
        return Registered(int(version.version), created=True)

    def _start_run(self) -> str:
        experiment = self.client.get_experiment_by_name(_EXPERIMENT)
        if experiment is not None:
            number = experiment.experiment_id
        else:  # a server has a place of its own for artifacts
            place = None if self.file is None else (self.file.parent / "artifacts").as_uri()
            number = self.client.create_experiment(_EXPERIMENT, artifact_location=place)
        return self.client.create_run(number, run_name=self.name).info.run_id

    def _drop_run(self, run_id: str) -> None:
        """Forget a run that no version came of; of a local registry, delete what it copied, too."""
        self.client.set_terminated(run_id, "FAILED")
        if self.file is not None:
            shutil.rmtree(self.file.parent / "artifacts" / run_id, ignore_errors=True)
        self.client.delete_run(run_id)

    def _log_manifest(self, run_id: str, parts: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            manifest = Path(temporary) / MANIFEST_FILE
            manifest.write_text(json.dumps({"parts": parts}, indent=2) + "\n", encoding="utf-8")
            self.client.log_artifact(run_id, str(manifest))

    def _read_manifest(self, version: ModelVersion) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory() as temporary:
            path = self.artifact(version, MANIFEST_FILE, Path(temporary))
            return None if path is None else json.loads(path.read_text(encoding="utf-8"))["parts"]

    def _copy(self, run_id: str, folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, Any]]) -> None:
        for part, folder in folders.items():
            for name in parts[part]["files"]:
                place = Path(_COPIES, part, name).parent
                self.client.log_artifact(run_id, str(folder / name), place.as_posix())

    def _log_results(self, run_id: str, results: Results) -> None:
        for key, folder in results.folders.items():
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    self.client.log_artifact(run_id, str(path), key)
        for key, value in results.metrics.items():
            self.client.log_metric(run_id, key, value)

    def _refile(
        self, version: ModelVersion, folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, Any]], *, copy: bool
    ) -> tuple[str, ...]:
        """Take parts that are new, other than before, gone from their place or not yet copied; return their names."""
        known, copied = self._read_manifest(version) or {}, version.tags.get("copied") == "true"
        taken = {
            name: part for name, part in parts.items()
            if name not in known or known[name]["files"] != part["files"]
            or (copy and not copied) or not (copied or is_present(known[name]))
        }  # fmt: skip
        if not taken:
            return ()
        if copy or copied:
            self._copy(version.run_id, {name: folders[name] for name in taken}, taken)
        self._log_manifest(version.run_id, {**known, **taken})
        facts = {"copied": str(copy or copied).lower()}
        if "model" in taken:
            facts["model_path"] = taken["model"]["path"]
        for key, value in facts.items():
            self.client.set_model_version_tag(self.name, version.version, key, value)
        return tuple(taken)

    def _update(self, version: ModelVersion, results: Results) -> tuple[str, ...]:
        new = {key: json.dumps(value) for key, value in results.summaries.items()}
        changed = tuple(key for key, value in new.items() if version.tags.get(key) != value)
        if changed:
            self._log_results(version.run_id, results)
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
        if not _NAME.fullmatch(alias) or alias.isdecimal():
            raise PokegemmaError(f"--alias: {alias!r} is no alias; take a word such as champion")
        version = self.find(spec)
        number = int(version.version)
        described = self.describe(spec)
        reasons = refusals(described["evaluation"], described["parity"])
        if reasons and not force:
            raise CheckFailedError(f"version {number} is not promoted: {'; '.join(reasons)} (--force does it anyway)")
        with self._lock(), self._plain_errors():
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
        with self._lock(), self._plain_errors():
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

    def export(self, spec: str, output: Path, *, part: str = "model", overwrite: bool = False) -> int:
        """Write a version's model, or one of its exports, as a folder; return the version's number.

        Every file is compared with the hash it was registered with, after copying.

        Raises:
            PokegemmaError: there is no such version or part, or `output` may not be written.
            CheckFailedError: a file is missing or changed; nothing is left at `output`.
        """
        version = self.find(spec)
        parts = self._read_manifest(version)
        if parts is None:
            raise PokegemmaError(f"version {version.version} has no {MANIFEST_FILE}: not of this project")
        if part not in parts:
            raise PokegemmaError(f"--part: version {version.version} has no {part!r}; it has {', '.join(parts)}")
        source, files = Path(parts[part]["path"]), parts[part]["files"]
        if output.resolve().is_relative_to(source) or source.is_relative_to(output.resolve()):
            raise PokegemmaError(f"--output_dir {output} holds the registered files, or lies in them; choose another")
        with atomic_folder(output, stage="export", overwrite=overwrite) as folder:
            fetched = folder / ".fetched"
            if version.tags.get("copied") == "true":
                fetched.mkdir()
                source = self.artifact(version, f"{_COPIES}/{part}", fetched) or source
            check_present(source, files)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if fetched.exists():
                    (source / name).rename(folder / name)
                else:
                    shutil.copyfile(source / name, folder / name)
            shutil.rmtree(fetched, ignore_errors=True)
            check_files(folder, files, FileHashes(), called=source)
            record: dict[str, Any] = {}
            if part == "model":
                for name in (RUN_FILE, CARD_FILE):
                    self.artifact(version, name, folder)
                record = read_run_record(folder) or {}
            write_run_record(
                folder, stage="export", options={"name": self.name, "version": int(version.version), "part": part},
                training=record.get("training") or record or None, exported=record or None,
            )  # fmt: skip
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
