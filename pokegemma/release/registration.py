"""Register a model: make a version of it, or update the version that has the same files.

A version is a model version of MLflow with its facts as tags, and an MLflow run with its files. The version is made
last: a registration that was killed leaves only a run, which the next registration deletes.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.entities.model_registry import ModelVersion

from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import ModelResults, read_results

MANIFEST_FILE = "manifest.json"
COPIES = "files"
_EXPERIMENT = "pokegemma"
MARK = "pokegemma.registers"
"""Tag of the runs that are made here, with the content's hash; others may keep runs in the same experiment."""

Parts = Mapping[str, Mapping[str, Any]]
"""The model and its exports by name: "path" of the folder, "copied", and "files": {name: {"sha256", "size"}}."""


def find_all(search: Callable[..., Any], *query: Any) -> list[Any]:
    """Return what a search of MLflow's client finds, on all of its pages."""
    page = search(*query)
    found = list(page)
    while page.token:
        page = search(*query, page_token=page.token)
        found += page
    return found


@dataclass(frozen=True)
class Submission:
    """A model to register: its parts, the tags of its version, and its results."""

    parts: Parts
    tags: Mapping[str, str]
    results: ModelResults


@dataclass(frozen=True)
class Registration:
    """A version. `created` is False if a version with this content existed; then `updated` names the results that were
    replaced, and `refiled` the parts (the model, exports) whose files are now those of the given folders.
    """

    version: int
    created: bool
    updated: tuple[str, ...] = ()
    refiled: tuple[str, ...] = ()


def read_submission(
    model_path: Path,
    *,
    evaluation: Path | None = None,
    parity: Path | None = None,
    exports: Sequence[Path] = (),
    copy: bool = False,
) -> Submission:
    """Read and hash the folders of a model; an export is named by the last part of its path.

    Raises:
        PokegemmaError: a folder is not complete, or results are those of another model.
    """
    if not (model_path / "config.json").is_file() or not list(model_path.glob("*.safetensors")):
        raise PokegemmaError(f"{model_path}: no model (config.json and *.safetensors); register a merged one")
    record = read_run_record(model_path)
    if record is None:
        raise PokegemmaError(f"{model_path}/{RUN_FILE} not found, which describes how the model was made")
    results = read_results(model_path, record, evaluation=evaluation, parity=parity)
    folders = {"model": model_path, **{path.name: path for path in exports}}
    if len(folders) != 1 + len(exports):
        raise PokegemmaError("--exports: two folders have the same name, or a folder is named model")
    hashes = FileHashes()
    parts = {
        name: {"path": str(path.resolve()), "files": hash_folder(path, hashes), "copied": copy}
        for name, path in folders.items()
    }
    training = record.get("training") or record
    tags = {
        "content_sha256": content_hash(parts["model"]["files"]),
        "dataset_sha256": (training.get("dataset") or {}).get("sha256", "unknown"),
        "git_commit": record.get("git_commit") or "unknown",
        "model_path": parts["model"]["path"],
        "copied": str(copy).lower(),
        **{key: json.dumps(summary) for key, summary in results.summaries.items()},
    }
    return Submission(parts, tags, results)


def open_experiment(client: MlflowClient, artifacts: Path | None) -> str:
    """Return the id of the experiment that has the runs; make it if it does not exist.

    In a local registry, whose files are in `artifacts` and whose lock the caller holds, end the runs of killed
    registrations. Without a lock, as on a server, such a run may belong to a registration that is still running.
    """
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    if experiment is None:
        return client.create_experiment(_EXPERIMENT, artifact_location=artifacts and artifacts.as_uri())
    if artifacts is not None:
        unfinished = f"tags.`{MARK}` != '' and attributes.status != 'FINISHED'"
        for run in find_all(client.search_runs, [experiment.experiment_id], unfinished):
            _end_run(client, run.info, is_local=True)
    return experiment.experiment_id


def make_version(
    client: MlflowClient, name: str, new: Submission, *, experiment: str, description: str | None, is_local: bool
) -> Registration:
    """Make a version of the model `name`; if this fails, its files are deleted."""
    run = client.create_run(experiment, run_name=name, tags={MARK: new.tags["content_sha256"]}).info
    try:
        client.log_dict(run.run_id, {"parts": new.parts}, MANIFEST_FILE)
        _log_files(client, run.run_id, new, new.parts, (RUN_FILE, CARD_FILE))
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        made = client.create_model_version(name, run.artifact_uri, run.run_id, tags=new.tags, description=description)
    finally:
        _end_run(client, run, is_local=is_local)
    return Registration(int(made.version), created=True)


def update_version(client: MlflowClient, version: ModelVersion, known: Parts, new: Submission) -> Registration:
    """Replace results that differ, and parts that differ, are missing, or are to be copied and were not."""
    parts = {
        name: {**part, "copied": part["copied"] or version.tags["copied"] == "true"}
        for name, part in new.parts.items()
        if name not in known
        or known[name]["files"] != part["files"]
        or (part["copied"] and not known[name]["copied"])
        or not is_present(known[name])
    }
    updated = [key for key in new.results.summaries if version.tags.get(key) != new.tags[key]]
    tags = {key: new.tags[key] for key in updated}
    if parts:
        tags["copied"] = str(any(part["copied"] for part in parts.values())).lower()
    if "model" in parts:
        tags["model_path"] = new.tags["model_path"]
    if tags:
        _log_files(client, version.run_id, new, parts, (CARD_FILE,))
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)
        # Last: as long as the manifest is the old one, the next registration repeats all of this.
        client.log_dict(version.run_id, {"parts": {**known, **parts}}, MANIFEST_FILE)
    return Registration(int(version.version), created=False, updated=tuple(updated), refiled=tuple(parts))


def _log_files(client: MlflowClient, run_id: str, new: Submission, parts: Parts, records: Sequence[str]) -> None:
    """Write records of the model, its results and the files of copied parts into the run."""
    paths = [Path(new.tags["model_path"], name) for name in records]
    files = [(path, None) for path in paths if path.is_file()]
    for kind, folder in new.results.folders.items():
        files += [(path, kind) for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    for name, part in parts.items():
        if part["copied"]:
            files += [(Path(part["path"], file), Path(COPIES, name, file).parent.as_posix()) for file in part["files"]]
    for path, place in files:
        client.log_artifact(run_id, str(path), place)
    for key, value in new.results.metrics.items():
        client.log_metric(run_id, key, value)


def is_present(part: Mapping[str, Any]) -> bool:
    """Return whether a part was copied, or every file of it is in its folder with its size."""
    files = {Path(part["path"], name): file["size"] for name, file in part["files"].items()}
    return part["copied"] or all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def _end_run(client: MlflowClient, run: RunInfo, *, is_local: bool) -> None:
    """Finish the run of a version; delete a run of which no version was made, and its files if they are local."""
    if client.search_model_versions(f"run_id = '{run.run_id}'"):
        client.set_terminated(run.run_id)
        return
    if is_local and run.artifact_uri.startswith("file:"):
        folder = Path(url2pathname(urlsplit(run.artifact_uri).path)).parent
        assert folder.name == run.run_id
        shutil.rmtree(folder, ignore_errors=True)
    client.set_terminated(run.run_id, "FAILED")
    client.delete_run(run.run_id)
