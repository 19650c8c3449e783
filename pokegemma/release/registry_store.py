"""Where versions of a model are kept: MLflow's registry in a SQLite file or on a server, opened, locked and read."""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pokegemma.release.measurements import Results

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

from pokegemma.errors import PokegemmaError
from pokegemma.release.measurements import failures

MANIFEST_FILE = "manifest.json"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""What a model or an alias may be called."""


def find_all(search: Callable[..., Any], *query: Any) -> list[Any]:
    """Return what a search of MLflow's client finds, on all of its pages."""
    page = search(*query)
    found = list(page)
    while page.token:
        page = search(*query, page_token=page.token)
        found += page
    return found


class RegistryStore:
    """The versions of one model, in a local SQLite file or on a tracking server.

    Processes that write to the same file wait for each other.
    """

    def __init__(self, uri: str, name: str, *, create: bool = False) -> None:
        """Name a registry: a path, sqlite:///PATH, or http(s)://...; `create`: make the file where there is none.

        Raises:
            PokegemmaError: there is none, or `name` is no name. One that cannot be opened is an error of every method.
        """
        if not NAME.fullmatch(name):
            raise PokegemmaError(f"--name: {name!r} is no name of a model; take letters, digits, '.', '_' and '-'")
        self.name, self.uri = name, uri
        self.file: Path | None = None
        if uri.startswith("sqlite:///") or "://" not in uri:
            self.file = Path(uri.removeprefix("sqlite:///")).resolve()  # one lock, by whatever link it is reached
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
        with self.lock(), self.plain_errors():
            client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            client.search_registered_models(max_results=1)
            return client

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to the same file while a block runs."""
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
    def plain_errors(self) -> Iterator[None]:
        """Turn the errors of MLflow, its database and the disk in a block into one line."""
        try:
            yield
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            message = " ".join(str(error).split())
            raise PokegemmaError(f"registry {self.uri}: {message[:300]}") from error

    def versions(self) -> list[dict[str, Any]]:
        """Return what `describe` says of each version, the first one first."""
        with self.plain_errors():
            found = find_all(self.client.search_model_versions, f"name = '{self.name}'")
            aliases = self._aliases() if found else {}
            return [self._describe(version, aliases) for version in sorted(found, key=lambda one: int(one.version))]

    def find(self, spec: str) -> ModelVersion:
        """Return a version by its number or an alias.

        Raises:
            PokegemmaError: there is none.
        """
        with self.plain_errors():
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
        with self.plain_errors():
            return self._describe(self.find(spec), self._aliases())

    def _aliases(self) -> dict[str, str]:
        """Return the version of each alias."""
        return self.client.get_registered_model(self.name).aliases

    def _describe(self, version: ModelVersion, aliases: Mapping[str, str]) -> dict[str, Any]:
        tags = version.tags
        evaluation, parity = (json.loads(tags.get(key, "null")) for key in ("evaluation", "parity"))
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
            "evaluation": evaluation,
            "parity": parity,
            "failed": failures(evaluation, parity),
        }

    def artifact(self, version: ModelVersion, path: str, folder: Path) -> Path | None:
        """Fetch an artifact (a file, or a folder with what is in it) into `folder`; None where there is none."""
        if not version.run_id:  # somebody else made it
            return None
        with self.plain_errors():
            parent = str(Path(path).parent)
            if path not in {file.path for file in self.client.list_artifacts(version.run_id, parent.strip("."))}:
                return None
            return Path(self.client.download_artifacts(version.run_id, path, str(folder)))

    def read_manifest(self, version: ModelVersion) -> dict[str, Any] | None:
        """Return the parts of a version (the model, exports); None where it has no manifest.

        Of each: its path, whether it was copied, and size and hash of its files.
        """
        with tempfile.TemporaryDirectory() as temporary:
            path = self.artifact(version, MANIFEST_FILE, Path(temporary))
            if path is None:
                return None
            return json.loads(path.read_text(encoding="utf-8"))["parts"]


COPIES = "files"


_EXPERIMENT = "pokegemma"


_MARK = "pokegemma.registers"
"""Tag of the runs that are made here; anybody may keep others in the same experiment. It holds the content's hash."""


class RegistryRuns(RegistryStore):
    """How runs are begun, filled and dropped. Call these with the lock held."""

    def start_run(self, content: str) -> str:
        """Begin a run for a version of this content; return its id."""
        experiment = self.client.get_experiment_by_name(_EXPERIMENT)
        if experiment is not None:
            number = experiment.experiment_id
        else:  # a server has a place of its own for artifacts
            place = None if self.file is None else (self.file.parent / "artifacts").as_uri()
            number = self.client.create_experiment(_EXPERIMENT, artifact_location=place)
        return self.client.create_run(number, run_name=self.name, tags={_MARK: content}).info.run_id

    def drop_run(self, run_id: str) -> None:
        """Forget a run that no version came of; of a local registry, delete what it copied, too."""
        uri = self.client.get_run(run_id).info.artifact_uri
        if self.file is not None and uri.startswith("file:"):
            place = Path(url2pathname(urlsplit(uri).path))
            assert place.parent.name == run_id  # what is removed is the run's own folder
            shutil.rmtree(place.parent, ignore_errors=True)
        self.client.set_terminated(run_id, "FAILED")
        self.client.delete_run(run_id)

    def settle_run(self, run_id: str) -> None:
        """End the run of a registration that was interrupted: drop it, unless a version was made of it already."""
        if find_all(self.client.search_model_versions, f"run_id = '{run_id}'"):
            self.client.set_terminated(run_id)  # nothing is missing
        else:
            self.drop_run(run_id)

    def drop_killed_runs(self) -> None:
        """Drop what killed registrations left in a local registry.

        With the lock held, none of them is still going on. A server has no such lock, so there they stay.
        """
        experiment = self.client.get_experiment_by_name(_EXPERIMENT)
        if self.file is None or experiment is None:
            return
        query = f"tags.`{_MARK}` != '' and attributes.status != 'FINISHED'"
        for run in find_all(self.client.search_runs, [experiment.experiment_id], query):
            self.settle_run(run.info.run_id)

    def log_manifest(self, run_id: str, parts: Mapping[str, Any]) -> None:
        """Write which files the parts of a version consist of; replaces the earlier manifest."""
        with tempfile.TemporaryDirectory() as temporary:
            manifest = Path(temporary) / MANIFEST_FILE
            manifest.write_text(json.dumps({"parts": parts}, indent=2) + "\n", encoding="utf-8")
            self.client.log_artifact(run_id, str(manifest))

    def copy_parts(self, run_id: str, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy the files of parts from where their "path" says."""
        for name, part in parts.items():
            for file in part["files"]:
                place = Path(COPIES, name, file).parent
                self.client.log_artifact(run_id, str(Path(part["path"], file)), place.as_posix())

    def log_results(self, run_id: str, results: Results) -> None:
        """Write the files of an evaluation and a comparison, and their figures."""
        for key, folder in results.folders.items():
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    self.client.log_artifact(run_id, str(path), key)
        for key, value in results.metrics.items():
            self.client.log_metric(run_id, key, value)
