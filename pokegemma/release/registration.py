"""Register a model: read its folders, and make a version of it or update the version that has the same files."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, content_hash, hash_folder
from pokegemma.outputs import RUN_FILE
from pokegemma.provenance import read_run_record
from pokegemma.release import registry_files
from pokegemma.release.measurements import ModelResults, read_results
from pokegemma.release.registry_files import VersionPart, find_all


@dataclass(frozen=True)
class Submission:
    """A model to register: its parts, the tags of its version, and its results."""

    model_path: Path
    parts: Mapping[str, VersionPart]
    tags: Mapping[str, str]
    results: ModelResults
    copy: bool


def read_submission(
    model_path: Path, *, evaluation: Path | None, parity: Path | None, exports: Sequence[Path], copy: bool
) -> Submission:
    """Read and hash the folders of a model.

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
    return Submission(model_path, parts, tags, results, copy)


@dataclass(frozen=True)
class Registration:
    """A version. `created` is False if a version with this content existed; then `updated` names the results that were
    replaced, and `refiled` the parts (the model, exports) whose files are now those of the given folders.
    """

    version: int
    created: bool
    updated: tuple[str, ...] = ()
    refiled: tuple[str, ...] = ()


def make_version(
    client: MlflowClient, name: str, submission: Submission, *, description: str | None, artifacts: Path | None
) -> Registration:
    """Make a version of the model `name`; if this fails, its files are deleted.

    `artifacts`: folder for the files of a local registry; a server has its own.
    """
    tags = submission.tags
    run_id = registry_files.start_run(client, name, tags["content_sha256"], artifacts=artifacts)
    with contextlib.ExitStack() as undo:
        undo.callback(registry_files.settle_run, client, run_id, local=artifacts is not None)
        registry_files.write_manifest(client, run_id, submission.parts)
        registry_files.write_records(client, run_id, submission.model_path)
        registry_files.write_results(client, run_id, submission.results)
        if submission.copy:
            registry_files.copy_parts(client, run_id, submission.parts)
        source = client.get_run(run_id).info.artifact_uri
        if not find_all(client.search_registered_models, f"name = '{name}'"):
            client.create_registered_model(name)
        version = client.create_model_version(name, source, run_id, tags=tags, description=description)
        undo.pop_all()
    client.set_terminated(run_id)
    return Registration(int(version.version), created=True)


def update_version(client: MlflowClient, version: ModelVersion, submission: Submission) -> Registration:
    """Replace results that differ, and parts that differ, are missing, or are to be copied and were not."""
    run_id = version.run_id
    known = registry_files.read_manifest(client, version) or {}
    copy = submission.copy or version.tags.get("copied") == "true"
    parts = {
        name: {**part, "copied": copy}
        for name, part in submission.parts.items()
        if name not in known
        or known[name]["files"] != part["files"]
        or (submission.copy and not known[name]["copied"])
        or not registry_files.is_present(known[name])
    }
    results = submission.results.summaries
    updated = tuple(key for key in results if version.tags.get(key) != submission.tags[key])
    changed = {key: submission.tags[key] for key in updated}
    if updated:
        registry_files.write_results(client, run_id, submission.results)
    if parts:
        if copy:
            registry_files.copy_parts(client, run_id, parts)
        changed["copied"] = str(copy).lower()
    if "model" in parts:
        changed["model_path"] = submission.tags["model_path"]
    for key, value in changed.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    if changed:
        registry_files.write_records(client, run_id, submission.model_path, names=(CARD_FILE,))
    if parts:  # last: as long as the manifest is the old one, the next registration repeats all of this
        registry_files.write_manifest(client, run_id, {**known, **parts})
    return Registration(int(version.version), created=False, updated=updated, refiled=tuple(parts))
