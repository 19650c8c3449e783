"""README.md of a model: what it is, how accurate it is, what it was made from; nothing about the machine."""

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from pokegemma.data.samples import TRAIN_FILE, dataset_hash
from pokegemma.pages import render_page
from pokegemma.provenance import is_hub_id, read_run_record
from pokegemma.release.measurements import METRICS_FILE, PARITY_FILE, read_json
from pokegemma.tables import format_interval, format_percent

_FAMILIES = {"gemma3": "Gemma 3", "gemma3n": "Gemma 3n", "gemma4": "Gemma 4"}
_LICENSES = {"gemma3": "gemma", "gemma3n": "gemma", "gemma4": "apache-2.0"}
_LICENSE_TEXTS = {
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "<https://ai.google.dev/gemma/terms>. This is a modified version of Gemma; whoever passes it on passes these terms "
    "on, too.",
    "apache-2.0": "Apache-2.0.",
}
_VIEWS = {
    "grid": "the last four frames as one picture",
    "frames": "the last four frames",
    "trajectory": "the frames of a stretch of play, one after each decision",
}
_TRAINING_OPTIONS = (
    "finetuning",
    "layout",
    "image_size",
    "train_vision_tower",
    "train_projector",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_decisions",
    "seed",
)
"""Options that matter to a reader, none of which can contain a path or a name of the machine."""


def public_name(value: str) -> str:
    """Return a Hub id, an address or a plain word unchanged, and the last part of a path."""
    if is_hub_id(value):
        return value
    return PureWindowsPath(value).name or value  # splits at both / and \


def base_model_name(record: Mapping[str, Any]) -> str:
    """Return the base checkpoint of a model's run.json, "unknown" if it has none."""
    training = record.get("training") or record
    return training.get("base_model") or record.get("options", {}).get("base_model") or "unknown"


def choose_license(base: str, model_type: str) -> str:
    """Return the Hub's id of the licence that a model made from `base` has.

    A tiny checkpoint of scripts/make_tiny_model.py has random weights, so that no licence of Gemma applies.
    """
    if ((read_run_record(Path(base)) or {}) if Path(base).is_dir() else {}).get("stage") == "tiny model":
        return "apache-2.0"
    return _LICENSES.get(model_type, "other")


def license_text(license_id: str) -> str:
    """Return what a model card says of a licence."""
    return _LICENSE_TEXTS.get(license_id, f"{license_id}.")


def front_matter(*, base: str, license_id: str, model_type: str, exports: Mapping[str, Path]) -> str:
    """Return the YAML head that the Hub reads."""
    facts: dict[str, Any] = {"license": license_id}
    if is_hub_id(base):
        facts["base_model"] = base
    facts |= {
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "language": ["en"],
        "tags": ["pokegemma", "pokemon", "game-playing", "vision-language-model", model_type, *sorted(exports)],
    }
    return yaml.safe_dump(facts, sort_keys=False)


def render_card(
    model: Path,
    *,
    evaluation: Path,
    parity: Path | None,
    dataset: Path,
    exports: Mapping[str, Path],
    license_id: str | None = None,
    name: str = "pokegemma",
) -> str:
    """Return the model card as Markdown; the same files give the same text.

    Args:
        model: the checkpoint, with its run.json.
        evaluation, parity: the output folders of these scripts.
        dataset: the JSONL file that it was evaluated on.
        exports: kind ("gguf", "mlx") and folder of each.

    Raises:
        PokegemmaError: one of the files is missing or damaged.
    """
    record, config = read_run_record(model) or {}, read_json(model / "config.json")
    trained = record.get("training") or record
    base, model_type = base_model_name(record), config.get("model_type", "unknown")
    license_id = license_id or choose_license(base, model_type)
    result = read_json(evaluation / METRICS_FILE)
    layout = trained.get("options", {}).get("layout", "grid")
    return render_page(
        Path(__file__).with_name("model_card.md.jinja"),
        filters={"percent": format_percent, "interval": format_interval, "figure": _figure, "public": public_name},
        front_matter=front_matter(base=base, license_id=license_id, model_type=model_type, exports=exports),
        name=name,
        family=_FAMILIES.get(model_type, model_type),
        view=_VIEWS.get(layout, layout),
        evaluation=result,
        sentence=_sentence(result),
        verification=record.get("verification"),
        parity=None if parity is None else read_json(parity / PARITY_FILE),
        data=_data_rows(dataset, trained),
        trained_here=_is_trained_on(dataset, trained),
        training=_training_rows(base, trained, record),
        image_attention=config.get("image_attention", "bidirectional"),
        license_text=license_text(license_id),
    )


def _sentence(result: Mapping[str, Any]) -> str:
    headline = result["headline"]
    baseline = next(row["name"] for row in result["rows"] if row["key"] == headline["best_baseline"])
    accuracy, best = (format_percent(headline[key]) for key in ("model_accuracy", "best_baseline_accuracy"))
    return (
        f"It presses the right button on {accuracy} of turns; the best baseline that uses no picture ({baseline}) "
        f"reaches {best}."
    )


def _is_trained_on(dataset: Path, trained: Mapping[str, Any]) -> bool:
    """Return whether training read the train.jsonl next to the evaluated data."""
    train = dataset.parent / TRAIN_FILE
    return train.is_file() and dataset_hash(train) == (trained.get("dataset") or {}).get("sha256")


def _data_rows(dataset: Path, trained: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("trained on, SHA-256 of train.jsonl", (trained.get("dataset") or {}).get("sha256", "unknown")),
        ("evaluated on, SHA-256 of eval.jsonl", dataset_hash(dataset)),
    ]
    report_file = dataset.parent / "conversion_report.json"
    if report_file.is_file() and _is_trained_on(dataset, trained):
        report = read_json(report_file)
        sessions = report["sessions"]
        rows += [
            ("recorded sessions", f"{sessions['found']}, of which {sessions['with_samples']} gave samples"),
            ("turns", f"{report['turns']}, of which {report['samples']} became samples"),
        ]
        left_out = {key: count for key, count in report["turns_without_sample"].items() if count}
        if left_out:
            rows.append(("turns left out", ", ".join(f"{key} {count}" for key, count in left_out.items())))
        for split, facts in report["splits"].items():
            rows.append((split, f"{facts['samples']} samples of {facts['sessions']} sessions"))
    return rows


def _training_rows(base: str, trained: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = trained.get("options", {})
    rows = [("base", public_name(base))]
    if trained.get("base_fingerprint"):
        rows.append(("fingerprint of the base", trained["base_fingerprint"]))
    unused = "num_train_epochs" if (options.get("max_steps") or 0) > 0 else "max_steps"  # the second wins
    unused = {unused} if options.get("layout") == "trajectory" else {unused, "max_decisions"}
    shown = [key for key in _TRAINING_OPTIONS if options.get(key) is not None and key not in unused]
    rows += [(f"`{key}`", str(options[key])) for key in shown]
    rows.append(("commit of training", trained.get("git_commit") or "unknown"))
    if record is not trained:
        rows.append(("commit of merging", record.get("git_commit") or "unknown"))
    versions = trained.get("versions") or {}
    rows.append(("versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
    return rows


def _figure(value: Any) -> str:
    return "–" if not isinstance(value, int | float) else f"{value:.3f}"
