"""Files of a registered version, in the MLflow run that it points to: a manifest of its parts, records, results.

The version is made last. A registration that was killed before leaves a run without a version, and the next one
deletes that run.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pokegemma.errors import CheckFailedError
from pokegemma.fingerprints import CARD_FILE, FileHashes, require_unchanged
from pokegemma.outputs import RUN_FILE
from pokegemma.release.measurements import ModelResults, failures

MANIFEST_FILE = "manifest.json"
COPIES = "files"
_EXPERIMENT = "pokegemma"
_MARK = "pokegemma.registers"
"""Tag of the runs that are made here, with the content's hash; others may keep runs in the same experiment."""

VersionPart = Mapping[str, Any]
"""The model or an export: "path" of its folder, "copied", and "files": {name: {"sha256", "size"}}."""


def find_all(search: Callable[..., Any], *query: Any) -> list[Any]:
    """Return what a search of MLflow's client finds, on all of its pages."""
    page = search(*query)
    found = list(page)
    while page.token:
        page = search(*query, page_token=page.token)
        found += page
    return found


def describe_version(version: ModelVersion, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of a version as JSON has them; `aliases`: the version of each alias."""
    tags = version.tags
    evaluation, parity = (json.loads(tags.get(key, "null")) for key in ("evaluation", "parity"))
    return {
        "name": version.name,
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


def start_run(client: MlflowClient, name: str, content: str, *, artifacts: Path | None) -> str:
    """Start a run for a version with this hash of its content, and return the run's id.

    `artifacts`: folder for the files of a local registry; a server has its own.
    """
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    if experiment is not None:
        number = experiment.experiment_id
    else:
        number = client.create_experiment(_EXPERIMENT, artifact_location=artifacts and artifacts.as_uri())
    return client.create_run(number, run_name=name, tags={_MARK: content}).info.run_id


def settle_run(client: MlflowClient, run_id: str, *, local: bool) -> None:
    """End the run of a registration that was interrupted: delete it, unless a version was made of it already."""
    if find_all(client.search_model_versions, f"run_id = '{run_id}'"):
        client.set_terminated(run_id)  # nothing is missing
        return
    uri = client.get_run(run_id).info.artifact_uri
    if local and uri.startswith("file:"):
        folder = Path(url2pathname(urlsplit(uri).path)).parent
        assert folder.name == run_id
        shutil.rmtree(folder, ignore_errors=True)
    client.set_terminated(run_id, "FAILED")
    client.delete_run(run_id)


def drop_killed_runs(client: MlflowClient) -> None:
    """Settle the runs of killed registrations in a local registry, whose lock the caller holds.

    Without a lock, as on a server, such a run may belong to a registration that is still running.
    """
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    if experiment is not None:
        query = f"tags.`{_MARK}` != '' and attributes.status != 'FINISHED'"
        for run in find_all(client.search_runs, [experiment.experiment_id], query):
            settle_run(client, run.info.run_id, local=True)


def write_manifest(client: MlflowClient, run_id: str, parts: Mapping[str, VersionPart]) -> None:
    """Write which files the parts of a version consist of; replaces the earlier manifest."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, MANIFEST_FILE)
        manifest.write_text(json.dumps({"parts": parts}, indent=2) + "\n", encoding="utf-8")
        client.log_artifact(run_id, str(manifest))


def read_manifest(client: MlflowClient, version: ModelVersion) -> dict[str, VersionPart] | None:
    """Return the parts of a version, None for a version without a manifest."""
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(client, version, MANIFEST_FILE, Path(folder))
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))["parts"]


def fetch(client: MlflowClient, version: ModelVersion, name: str, folder: Path) -> Path | None:
    """Fetch an artifact (a file, or a folder with its files) into `folder`; None if the version has none."""
    if not version.run_id:  # not made by this project
        return None
    parent = str(Path(name).parent).strip(".")
    if name not in {file.path for file in client.list_artifacts(version.run_id, parent)}:
        return None
    folder.mkdir(exist_ok=True)
    return Path(client.download_artifacts(version.run_id, name, str(folder)))


def copy_parts(client: MlflowClient, run_id: str, parts: Mapping[str, VersionPart]) -> None:
    """Copy the files of parts into the run."""
    for name, part in parts.items():
        for file in part["files"]:
            client.log_artifact(run_id, str(Path(part["path"], file)), Path(COPIES, name, file).parent.as_posix())


def write_records(
    client: MlflowClient, run_id: str, model_path: Path, *, names: Sequence[str] = (RUN_FILE, CARD_FILE)
) -> None:
    """Write a model's run.json and card into the run, as far as it has them."""
    for name in names:
        if (model_path / name).is_file():
            client.log_artifact(run_id, str(model_path / name))


def write_results(client: MlflowClient, run_id: str, results: ModelResults) -> None:
    """Write the files of an evaluation and a comparison into the run, and their figures."""
    for name, folder in results.folders.items():
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                client.log_artifact(run_id, str(path), name)
    for key, value in results.metrics.items():
        client.log_metric(run_id, key, value)


def is_present(part: VersionPart) -> bool:
    """Return whether every file of a part is in its folder, with its size, or was copied."""
    files = {Path(part["path"], name): file["size"] for name, file in part["files"].items()}
    return part["copied"] or all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def write_part(part: VersionPart, folder: Path, *, copies: Path | None) -> None:
    """Write the files of a part into a folder, and compare them with their registered hashes.

    `copies`: where the copied files were fetched; they are moved.

    Raises:
        CheckFailedError: a file is missing or changed.
    """
    source, files = copies or Path(part["path"]), part["files"]
    if missing := [file for file in files if not (source / file).is_file()]:
        raise CheckFailedError(f"{source}: {len(missing)} of {len(files)} registered files are missing ({missing[0]})")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (shutil.move if copies else shutil.copyfile)(source / file, folder / file)
    if copies:
        shutil.rmtree(folder / copies.resolve().relative_to(folder.resolve()).parts[0])  # MLflow made it absolute
    require_unchanged(folder, files, FileHashes(), called=source)
