"""What is written of a version: an MLflow run, which holds its records and copies as artifacts.

The version is made last and names its run: a run of ours that none names, and that is not ended, is what a killed
registration left.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pokegemma.deploy.registry_store import MANIFEST_FILE, RegistryStore, find_all
from pokegemma.deploy.results import Results

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
