"""How much disk space a training run needs, and whether its folders have it."""

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import constants

from pokegemma.data.checks.records import Check
from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.feature_cache import missing_feature_bytes
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.training.preflight.memory import ModelSize, trained_bytes
from pokegemma.training.preflight.model_access import is_on_this_machine
from pokegemma.training.preflight.planned_run import PlannedRun


def run_bytes(size: ModelSize, *, finetuning: str, lora_r: int, bytes_per_weight: int) -> int:
    """Return the disk space that a run needs: for two checkpoints and the result, then the merged model in bfloat16."""
    trained = trained_bytes(size, finetuning=finetuning, lora_r=lora_r, bytes_per_weight=bytes_per_weight)
    whole = size.num_weights * bytes_per_weight if finetuning == "full" else 0
    return 3 * (trained + whole) + size.num_weights * 2


def step_bytes(size: ModelSize, *, finetuning: str, lora_r: int, bytes_per_weight: int) -> int:
    """Return the disk space that the one real step needs: for an adapter in float32, or the whole model."""
    return size.num_weights * bytes_per_weight if finetuning == "full" else size.num_lora_weights(lora_r) * 4


def disk_needs(
    run: PlannedRun, size: ModelSize, collators: Mapping[str, Collator], *, picture_bytes: int | None
) -> dict[Path, int]:
    """Return the bytes that will be written to each folder.

    These are the run, a download of the model, the one step (in TMPDIR), and the features that the cache lacks.

    Args:
        collators: by the name of the split.
        picture_bytes: of a picture's features; None without --vision_features.
    """
    model = run.options.model
    trained = {"finetuning": model.finetuning, "lora_r": model.lora_r, "bytes_per_weight": run.bytes_per_weight}
    needs: Counter[Path] = Counter({Path(run.options.training.output_dir): run_bytes(size, **trained)})
    if not is_on_this_machine(model.model_name_or_path):
        needs[Path(constants.HF_HUB_CACHE)] += size.num_weights * 2
    if run.step_command is not None:
        needs[Path(tempfile.gettempdir())] += step_bytes(size, **trained)
    if picture_bytes is not None:
        features = Path(run.options.data.vision_features)
        num_frames = _num_pictures(run, collators)
        needs[features] += missing_feature_bytes(features, num_frames=num_frames, bytes_per_frame=picture_bytes)
    return dict(needs)


def _num_pictures(run: PlannedRun, collators: Mapping[str, Collator]) -> int:
    pictures: set[str] = set()
    for split in run.splits:
        for _, example in run.rows(split):
            with contextlib.suppress(PokegemmaError):  # no grid picture: the check of token lengths names the sample
                pictures.update(collators[split.name].picture_paths(example))
    return len(pictures)


def check_disk(needs: Mapping[Path, int | None]) -> Check:
    """Fail if a folder is not writable, or if its disk has less space than the folders on it need.

    A folder that does not exist yet is on the disk of its nearest existing parent.

    Args:
        needs: bytes for each folder; None where they are not known.
    """
    disks: dict[int, list[tuple[Path, int | None]]] = {}
    for folder, needed in needs.items():
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:  # permissions do not show it: root has them all, but cannot write to /proc or a read-only disk
            with tempfile.TemporaryDirectory(prefix=".pokegemma_", dir=place):
                pass
        except OSError as error:
            return Check("disk space", "FAIL", f"{place} is not writable ({error.strerror})")
        disks.setdefault(place.stat().st_dev, []).append((place, needed))
    found, full = [], False
    for folders in disks.values():
        free, place = shutil.disk_usage(folders[0][0]).free, folders[0][0]
        needed = sum(amount or 0 for _, amount in folders)
        full |= free < needed
        what = f"about {needed / GIB:.1f} GiB needed" if needed else "how much is needed is unknown"
        found.append(f"{free / GIB:.1f} GiB free at {place}, {what}")
    return Check("disk space", "FAIL" if full else "PASS", "; ".join(found))
