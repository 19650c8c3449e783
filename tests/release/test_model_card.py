"""The model card: a head that the Hub reads, the measured tables, and nothing of the machine."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from pokegemma.evaluation import metrics, report
from pokegemma.evaluation.predict import Predictions
from pokegemma.provenance import write_run_record
from pokegemma.release.model_card import choose_license, public_name, render_card

TRAINED_ON = hashlib.sha256(b"{}\n").hexdigest()
SECRET_PLACES = ("/home/somebody/private", "C:\\Users\\somebody\\private")


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., str]:
    """Return a function that renders the card of a made-up model; its records are full of absolute paths."""
    model, evaluation, parity = tmp_path / "merged", tmp_path / "evaluation", tmp_path / "parity"
    for folder in (model, evaluation, parity, tmp_path / "dataset"):
        folder.mkdir()
    truth = np.arange(40) % 8
    sessions = tuple(f"s{number % 12}" for number in range(40))
    decisions = metrics.Decisions(truth, np.roll(truth, 1), sessions, sessions)
    scores = np.full((40, 8), 0.01)
    scores[np.arange(40), np.where(np.arange(40) < 4, (truth + 1) % 8, truth)] = 0.93
    result = report.build_metrics(decisions, decisions, Predictions(None, scores, {"scored": [0.01]}))
    report.write_report(evaluation, result, [], "")
    engine = {
        "name": "model-q8_0.gguf",
        "path": f"{SECRET_PLACES[0]}/gguf",
        "passed": True,
        "failures": [],
        "button_agreement": 0.98,
        "top1_agreement": 0.995,
        "valid_json_rate": 1.0,
        "log_probability_difference": {"mean": 0.0123, "max": 0.2},
        "latency_s": {"p50": 0.25, "p95": 0.5},
    }
    server = {**engine, "name": f"{SECRET_PLACES[0]}/model", "top1_agreement": None, "log_probability_difference": None}
    (parity / "parity.json").write_text(json.dumps({"passed": True, "num_samples": 50, "engines": [engine, server]}))
    (tmp_path / "dataset" / "eval.jsonl").write_text("{}\n")
    conversion = {
        "sessions": {"found": 33, "with_samples": 30},
        "turns": 657,
        "samples": 503,
        "turns_without_sample": {"failed_answer": 154, "no_button": 0},
        "splits": {"train": {"sessions": 27, "samples": 446}, "eval": {"sessions": 3, "samples": 57}},
    }
    (tmp_path / "dataset" / "conversion_report.json").write_text(json.dumps(conversion))

    def render(
        *,
        base: str = "google/gemma-3-4b-it",
        config: dict[str, Any] | None = None,
        shared: int = 0,
        available: int = 40,
        train: str | None = None,
        **changes: Any,
    ) -> str:
        report.write_report(
            evaluation, {**result, "num_sessions_shared_with_train": shared, "num_available": available}, [], ""
        )
        (tmp_path / "dataset" / "train.jsonl").write_text(train or "{}\n")
        (model / "config.json").write_text(json.dumps({"model_type": "gemma3", **(config or {})}))
        training = {
            "stage": "train",
            "git_commit": "c0ffee",
            "base_model": base,
            "base_fingerprint": "ab12",
            "versions": {"torch": "2.13.0"},
            "dataset": {"path": f"{SECRET_PLACES[0]}/train.jsonl", "sha256": TRAINED_ON},
            "options": {
                "layout": "grid",
                "lora_r": 16,
                "learning_rate": 2e-4,
                "max_decisions": 16,
                "max_steps": -1,
                "num_train_epochs": 3.0,
                "dataset_path": SECRET_PLACES[1],
                "output_dir": SECRET_PLACES[0],
                "hub_token": "hf_secret",
            },
        }
        verification = {
            "num_samples": 8,
            "adapter_effect": 0.5,
            "merged_error": 4e-7,
            "stored_error": 3e-3,
            "dtype": "bfloat16",
        }
        write_run_record(
            model, stage="merge", options={"lora_path": SECRET_PLACES[0]}, training=training, verification=verification
        )
        exports = {"gguf": Path(SECRET_PLACES[0])}
        return render_card(
            model,
            evaluation=evaluation,
            parity=parity,
            dataset=tmp_path / "dataset" / "eval.jsonl",
            exports=exports,
            **changes,
        )

    return render


def test_the_head_is_what_the_hub_reads(card: Callable[..., str]) -> None:
    data = ModelCard(card()).data
    assert data.license == "gemma"
    assert data.base_model == "google/gemma-3-4b-it"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.library_name == "transformers"
    assert {"pokegemma", "gemma3", "gguf"} <= set(data.tags)


def test_the_number_of_evaluated_decisions_is_given(card: Callable[..., str]) -> None:
    assert "Measured on 40 decisions of 12 sessions" in card()
    assert "Measured on 40 decisions of 310, evenly spread, of 12 sessions" in card(available=310)


def test_every_table_is_complete(card: Callable[..., str]) -> None:
    text = card()
    assert re.search(r"^\| model \(scored\) \| 90\.0 % \| .*–.* \| 0\.\d+ \|", text, re.MULTILINE)
    for name in ("majority", "repeat previous", "Markov, first order"):
        assert f"\n| {name} | " in text
    assert "\n| model-q8_0.gguf | 98.0 % | 99.5 % | 0.012 | 100.0 % | 250.0 |" in text
    assert "\n| model | 98.0 % | – | – | 100.0 % | 250.0 |" in text
    assert "4.0e-07" in text
    assert "\n| turns | 657, of which 503 became samples |" in text
    assert "failed_answer 154" in text
    assert "no_button" not in text
    assert TRAINED_ON in text
    assert "\n| `num_train_epochs` | 3.0 |" in text
    assert "`max_steps`" not in text
    assert "`max_decisions`" not in text  # of the layout trajectory alone
    assert "| same likeliest token |" in text
    assert "torch 2.13.0" in text
    assert "c0ffee" in text
    assert "ai.google.dev/gemma/terms" in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for block in blocks:  # a table is one block whose rows have as many cells as its head
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert len(blocks) == 4


def test_no_path_or_secret_of_the_machine_is_in_it(card: Callable[..., str], tmp_path: Path) -> None:
    for base in ("google/gemma-3-4b-it", f"{SECRET_PLACES[0]}/base_model", SECRET_PLACES[1], str(tmp_path)):
        text = card(base=base)
        for secret in ("somebody", "private/", "hf_secret", str(tmp_path), str(Path.home()) + "/"):
            assert secret not in text, (base, secret)
    assert "base_model:" not in card(base=f"{SECRET_PLACES[0]}/base_model")
    assert "\n| base | base_model |" in card(base=f"{SECRET_PLACES[0]}/base_model")


def test_the_same_files_give_the_same_text(card: Callable[..., str]) -> None:
    assert card() == card()


def test_the_licence_follows_the_base(tmp_path: Path, card: Callable[..., str]) -> None:
    assert choose_license("google/gemma-3-4b-it", "gemma3") == "gemma"
    assert choose_license("google/gemma-3n-E4B-it", "gemma3n") == "gemma"
    assert choose_license("google/gemma-4-E4B-it", "gemma4") == "apache-2.0"
    assert choose_license(str(tmp_path), "gemma3") == "gemma"  # a download
    write_run_record(tmp_path, stage="tiny model", options={})
    assert choose_license(str(tmp_path), "gemma3") == "apache-2.0"
    assert yaml.safe_load(card(license_id="mit").split("---")[1])["license"] == "mit"


def test_causal_image_attention_is_named(card: Callable[..., str]) -> None:
    assert "is bidirectional" in card()
    assert "trained with causal attention inside pictures" in card(config={"image_attention": "causal"})


def test_training_data_is_described_only_where_it_is_known(card: Callable[..., str]) -> None:
    assert "12 sessions, none of which it was trained on." in card()
    assert "no frame of an evaluated session was trained on" in card()
    for text, says in (
        (card(shared=3), "3 of the evaluated sessions were also trained on"),
        (card(train="other\n"), "trained on a different train.jsonl"),
    ):
        assert says in text
        assert "none of which" not in text
        assert "no frame of" not in text
    assert "446 samples" not in card(train="other\n")  # of a file that it never saw


def test_public_names_have_no_folders() -> None:
    assert public_name("google/gemma-3-4b-it") == "google/gemma-3-4b-it"
    assert [public_name(f"{place}/x") for place in SECRET_PLACES] == ["x", "x"]
