"""Training for real on the tiny checkpoint: what is trained, what is written, what is refused, and resuming."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.batches.processor_collator import make_collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import read_run_record, write_run_record
from pokegemma.training import sft
from pokegemma.training.inputs import load_dataset
from pokegemma.training.loss_curve import CURVE_FILE
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.run_folder import check_output
from pokegemma.training.run_record import _FIXED_OPTIONS, check_resumed
from pokegemma.training.trainable import load_trainable
from pokegemma.training.trainer import PokemonTrainer

QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


def run_training(dataset: Path, model: Path, output: Path, *, options: dict[str, Any], **changes: Any) -> bool:
    data = DataOptions(dataset_path=str(dataset), overwrite=changes.pop("overwrite", False))
    callbacks = changes.pop("callbacks", ())
    training = TrainingOptions(output_dir=str(output), **{**QUICK, **changes})
    return sft.train(data, training, ModelOptions(model_name_or_path=str(model), **options), callbacks=callbacks)


@pytest.fixture(scope="module")
def finished(toy_dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a finished LoRA run of four steps."""
    output = tmp_path_factory.mktemp("finished") / "adapter"
    assert run_training(toy_dataset, tiny_model, output, options={"finetuning": "lora"}, max_steps=4)
    return output


def test_a_run_writes_adapter_processor_curve_and_record(finished: Path, tiny_model: Path, toy_dataset: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "chat_template.jinja"} <= names
    assert Image.open(finished / CURVE_FILE).size == (960, 540)
    record = read_run_record(finished)
    assert (record["stage"], record["status"], record["global_step"]) == ("train", "completed", 4)
    assert record["options"]["layout"] == "grid"
    assert record["base_fingerprint"] == open_checkpoint(tiny_model).weights_fingerprint()
    assert record["dataset"]["path"] == str(toy_dataset / "train.jsonl")
    assert Path(json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"]).is_absolute()


def test_a_run_logs_loss_rate_norm_throughput_and_accuracy(finished: Path) -> None:
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for key in ("learning_rate", "grad_norm", "tokens_per_second", "decisions_per_second"):
        assert all(entry[key] > 0 for entry in steps[:-1]), key
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    assert all(0 <= entry["eval_button_accuracy"] <= 1 for entry in evaluations)
    assert list(finished.glob("runs/*/events*"))  # TensorBoard, since no W&B key is set


def test_a_run_shorter_than_eval_steps_is_evaluated_at_its_end(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run_training(toy_dataset, tiny_model, tmp_path, options={"finetuning": "lora"}, eval_steps=100, save_steps=100)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_button_accuracy" in entry] == [2]
    assert read_run_record(tmp_path)["best_checkpoint"].endswith("checkpoint-2")


def test_the_time_that_a_step_waits_for_its_pictures_is_logged(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a batch moves on by 3 s and a forward and backward pass by 1 s, however fast this machine is."""
    clock = [0.0]

    def moving_on(seconds: float, method: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return method(*args, **options)

        return call

    monkeypatch.setattr("pokegemma.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Gemma3Collator, "__call__", moving_on(3.0, Gemma3Collator.__call__))
    monkeypatch.setattr(PokemonTrainer, "training_step", moving_on(1.0, PokemonTrainer.training_step))
    run_training(toy_dataset, tiny_model, tmp_path, options={"finetuning": "lora"}, max_steps=3, eval_strategy="no")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    shares = [entry["data_wait_share"] for entry in history if "loss" in entry]
    assert shares[1:] == [0.75, 0.75]
    assert 0.75 < shares[0] < 1  # one batch more is prepared


def test_training_lowers_the_loss(finished: Path) -> None:
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_best_checkpoint_is_kept(finished: Path) -> None:
    record = read_run_record(finished)
    best = Path(record["best_checkpoint"])
    assert best.is_dir()
    kept, result = load_file(best / "adapter_model.safetensors"), load_file(finished / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], result[key]) for key in result)


def test_qlora_stores_the_language_model_in_nf4_and_not_the_tower(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = ModelOptions(model_name_or_path=str(tiny_model))
    model = load_trainable(options.open_checkpoint(), options, TrainingOptions(output_dir=str(tmp_path), use_cpu=True))
    quantised = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 6 * 7 and all("language_model" in name for name in quantised)
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    assert run_training(toy_dataset, tiny_model, tmp_path / "adapter", options={})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_full_fine_tuning_writes_a_checkpoint_and_keeps_the_frozen_parts(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert run_training(toy_dataset, tiny_model, tmp_path / "full", options={"finetuning": "full"})
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "full" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"language_model"}
    assert (tmp_path / "full" / "tokenizer.model").is_file()


@pytest.mark.slow(4)
def test_gradient_checkpointing_changes_nothing(
    finished: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = {"finetuning": "lora"}
    run_training(toy_dataset, tiny_model, tmp_path / "a", options=options, max_steps=4, gradient_checkpointing=True)
    ours, theirs = (
        load_file(tmp_path / "a" / "adapter_model.safetensors"),
        load_file(finished / "adapter_model.safetensors"),
    )
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)


def test_samples_with_different_numbers_of_frames_are_trained(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset), layout="frames")
    training = TrainingOptions(output_dir=str(tmp_path / "a"), **QUICK)
    assert sft.train(data, training, ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora"))
    assert read_run_record(tmp_path / "a")["options"]["layout"] == "frames"


def test_training_runs_without_a_held_out_file(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train.jsonl", "frames", "grid_images"):
        (alone / name).symlink_to(toy_dataset / name)
    assert run_training(alone, tiny_model, tmp_path / "a", options={"finetuning": "lora"})
    assert read_run_record(tmp_path / "a")["eval_dataset"] is None


def test_held_out_samples_of_another_folder_are_read_with_their_pictures(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset / "train.jsonl"), eval_dataset_path=str(toy_dataset))
    training = TrainingOptions(output_dir=str(tmp_path / "a"), **QUICK)
    assert sft.train(data, training, ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora"))
    assert read_run_record(tmp_path / "a")["eval_dataset"]["path"] == str(toy_dataset / "eval.jsonl")


def test_the_grid_layout_without_grid_pictures_is_refused(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    sample = next(read_samples(toy_dataset / "train.jsonl"))
    (tmp_path / "train.jsonl").write_text(dataclasses.replace(sample, image=None).to_json())
    with pytest.raises(PokegemmaError, match="use --layout frames"):
        run_training(tmp_path, tiny_model, tmp_path / "a", options={"finetuning": "lora"})
    assert not (tmp_path / "a").exists()


def test_an_unknown_target_module_is_reported_in_one_line(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = {"finetuning": "lora", "lora_target_modules": ["nothing_proj"]}
    with pytest.raises(PokegemmaError, match="nothing_proj"):
        run_training(toy_dataset, tiny_model, tmp_path / "a", options=options)


def test_an_earlier_run_is_kept_until_everything_is_checked(
    finished: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    shutil.copytree(finished, output)
    with pytest.raises(PokegemmaError, match="--overwrite"):
        run_training(toy_dataset, tiny_model, output, options={"finetuning": "lora"})
    with pytest.raises(PokegemmaError, match="no such folder"):
        run_training(toy_dataset, tmp_path / "nowhere", output, options={"finetuning": "lora"}, overwrite=True)
    with pytest.raises(PokegemmaError, match=" 50 tokens"):
        run_training(toy_dataset, tiny_model, output, options={"finetuning": "lora"}, overwrite=True, max_length=50)
    assert (output / "adapter_model.safetensors").is_file()
    assert run_training(toy_dataset, tiny_model, output, options={"finetuning": "lora"}, overwrite=True)
    assert read_run_record(output)["global_step"] == 2


def test_a_feature_cache_of_another_model_does_not_remove_an_earlier_run(
    finished: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output, features = tmp_path / "adapter", tmp_path / "features"
    shutil.copytree(finished, output)
    features.mkdir()
    (features / "key.json").write_text("{}")
    data = DataOptions(dataset_path=str(toy_dataset), overwrite=True, vision_features=str(features))
    training = TrainingOptions(output_dir=str(output), **QUICK)
    with pytest.raises(PokegemmaError, match="is of another model or size"):
        sft.train(data, training, ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora"))
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("which", ["dataset", "model"])
def test_an_output_folder_that_contains_an_input_is_refused(which: str, toy_dataset: Path, tiny_model: Path) -> None:
    folder = {"dataset": toy_dataset, "model": tiny_model}[which]
    with pytest.raises(PokegemmaError, match=r"--output_dir .* contains the input"):
        run_training(toy_dataset, tiny_model, folder, options={"finetuning": "lora"}, overwrite=True)
    assert (toy_dataset / "train.jsonl").is_file() and (tiny_model / "model.safetensors").is_file()


def test_the_result_of_another_step_is_not_overwritten(tmp_path: Path) -> None:
    write_run_record(tmp_path, stage="convert", options={})
    with pytest.raises(PokegemmaError, match="result of convert"):
        check_output(tmp_path, sources=[], overwrite=True, resume=None)


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match="no checkpoint in"):
        check_output(tmp_path, sources=[], overwrite=False, resume="last")


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [({"lora_r": 4}, "grid", "lora_r was 16, is 4"), ({}, "frames", "layout was grid, is frames")],
)
def test_resuming_with_other_options_is_refused(
    options: dict[str, Any], layout: str, message: str, finished: Path, toy_dataset: Path, tiny_model: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset), layout=layout)
    training = TrainingOptions(output_dir=str(finished), resume_from_checkpoint="last", **{**QUICK, "max_steps": 6})
    with pytest.raises(PokegemmaError, match=message):
        sft.train(data, training, ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora", **options))


def test_a_run_records_which_frames_its_samples_show(finished: Path) -> None:
    assert read_run_record(finished)["window"] == {"num_frames": 4, "min_frames": 4, "max_gap_s": 30.0}


def test_resuming_with_other_trajectory_options_is_refused(tmp_path: Path) -> None:
    options = dict.fromkeys(_FIXED_OPTIONS) | {"layout": "trajectory", "max_decisions": 8, "overlap_decisions": 2}
    facts = {"base_fingerprint": "f", "dataset": {"sha256": "d"}}
    write_run_record(tmp_path, stage="train", options=options, **facts)
    check_resumed(tmp_path, options=options, facts=facts)
    with pytest.raises(PokegemmaError, match="max_decisions was 8, is 4"):
        check_resumed(tmp_path, options={**options, "max_decisions": 4}, facts=facts)


def test_resuming_with_another_learning_rate_is_refused(tmp_path: Path) -> None:
    options = dict.fromkeys(_FIXED_OPTIONS) | {"layout": "grid", "learning_rate": 2e-4}
    facts = {"base_fingerprint": "f", "dataset": {"sha256": "d"}}
    write_run_record(tmp_path, stage="train", options=options, **facts)
    with pytest.raises(PokegemmaError, match=r"learning_rate was 0\.0002, is 0\.0001"):
        check_resumed(tmp_path, options={**options, "learning_rate": 1e-4}, facts=facts)


def test_answers_that_evaluation_cannot_read_are_refused_before_training(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy_dataset, tmp_path / "dataset")
    text = (toy_dataset / "eval.jsonl").read_text()
    (tmp_path / "dataset" / "eval.jsonl").write_text(
        text.replace('"output": "{\\"button\\": ', '"output": "{\\"button\\":')
    )
    with pytest.raises(PokegemmaError, match="10 answers do not begin with"):
        run_training(tmp_path / "dataset", tiny_model, tmp_path / "a", options={"finetuning": "lora"})
    assert not (tmp_path / "a").exists()


def test_a_single_process_uses_one_gpu(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingOptions(output_dir=str(tmp_path / "a"), **{**QUICK, "max_steps": 1})
    assert training.n_gpu == 0
    training._n_gpu = 2
    model = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    assert sft.train(DataOptions(dataset_path=str(toy_dataset)), training, model)
    assert training.n_gpu == 1
    assert "using one of 2 GPUs; accelerate launch uses all" in caplog.text


def test_resuming_a_finished_run_takes_no_step(
    finished: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    shutil.copytree(finished, output)
    (output / "adapter_model.safetensors").write_bytes(b"cut off")
    options = {"finetuning": "lora"}
    run_training(toy_dataset, tiny_model, output, options=options, max_steps=4, resume_from_checkpoint="last")
    assert read_run_record(output)["global_step"] == 4
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output, finished))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_checkpoint_with_an_incomplete_adapter_is_refused(
    finished: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    shutil.copytree(finished, output)
    weights = output / "checkpoint-4" / "adapter_model.safetensors"
    tensors = load_file(weights)
    gone = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, weights)
    options = {"options": {"finetuning": "lora"}, "max_steps": 6, "resume_from_checkpoint": "last"}
    with pytest.raises(PokegemmaError, match=f"checkpoint-4: 1 tensors .*: {gone}"):
        run_training(toy_dataset, tiny_model, output, **options)
    assert (output / "checkpoint-4" / "trainer_state.json").is_file()


@pytest.mark.parametrize("finetuning", ["qlora", "lora", "full"])
def test_a_quantised_base_is_refused(finetuning: str, toy_dataset: Path, quantised_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=f"{quantised_model}: .* stored quantised, .*google/gemma-3-4b-it"):
        run_training(toy_dataset, quantised_model, tmp_path / "a", options={"finetuning": finetuning})
    assert not (tmp_path / "a").exists()


@pytest.mark.slow(5)
def test_full_fine_tuning_resumes_where_it_stopped_and_returns_its_best(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options, through, resumed = {"finetuning": "full"}, tmp_path / "through", tmp_path / "resumed"
    settings = {"max_steps": 4, "learning_rate": 1e-3, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run_training(toy_dataset, tiny_model, through, options=options, **settings)  # the highest loss: not the last
    best = Path(read_run_record(through)["best_checkpoint"])
    assert best.name == "checkpoint-2"
    kept, result = (open_checkpoint(folder).load_model().state_dict() for folder in (best, through))
    assert all(torch.equal(kept[key], result[key]) for key in kept)
    # The schedule of four steps is kept: only the second checkpoint is there to continue from.
    shutil.copytree(through, resumed, ignore=shutil.ignore_patterns("checkpoint-4"))
    run_training(toy_dataset, tiny_model, resumed, options=options, resume_from_checkpoint="last", **settings)
    histories = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (resumed, through)
    ]
    ours, expected = ([(e["step"], e["loss"]) for e in history if "loss" in e] for history in histories)
    assert ours == expected


def test_qlora_trains_adapter_and_projector_in_float32(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert run_training(toy_dataset, tiny_model, tmp_path / "a", options={"train_projector": True})
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any("multi_modal_projector" in key for key in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "--load_in_8bit"),
        ({"model_revision": "v2"}, "--model_revision v2 is not supported"),
        ({"load_in_4bit": True, "finetuning": "lora"}, "contradicts --finetuning lora"),
        ({"use_peft": True, "finetuning": "full"}, "contradicts --finetuning full"),
    ],
)
def test_contradicting_model_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PokegemmaError, match=message):
        ModelOptions(**options)


def test_flex_attention_on_a_cpu_is_refused_in_one_line(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    """torch has no backward pass of it there."""
    options = {"finetuning": "lora", "attn_implementation": "flex_attention"}
    with pytest.raises(PokegemmaError, match="--attn_implementation flex_attention"):
        run_training(toy_dataset, tiny_model, tmp_path / "adapter", options=options)


@pytest.mark.parametrize(
    ("view", "flag"), [({"samples_per_row": 2}, "--samples_per_row"), ({"layout": "trajectory"}, "--layout trajectory")]
)
def test_shared_rows_are_refused_for_an_attention_without_masks(view: dict[str, Any], flag: str) -> None:
    data, flex = DataOptions(dataset_path="d", **view), ModelOptions(attn_implementation="flex_attention")
    with pytest.raises(PokegemmaError, match=f"{flag} .* --attn_implementation .* flex_attention"):
        sft.check_fast_paths(data, flex)
    sft.check_fast_paths(data, ModelOptions(attn_implementation="eager"))
    sft.check_fast_paths(DataOptions(dataset_path="d"), flex)


def test_a_batch_smaller_than_its_rows_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = DataOptions(dataset_path=str(tmp_path / "missing"), samples_per_row=4)
    training = TrainingOptions(output_dir=str(tmp_path / "a"), use_cpu=True)
    with pytest.raises(PokegemmaError, match="missing not found"):
        sft.train(data, training, ModelOptions(finetuning="lora"))
    assert "--samples_per_row 4: a forward pass has 2 samples" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"fp16": True},
        {"packing": True},
        {"padding_free": True},
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
        {"chat_template_path": "x"},
        {"push_to_hub": True},
    ],
)
def test_options_that_gemma_3_does_not_have_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError):
        TrainingOptions(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options", [{"eval_strategy": "epoch"}, {"eval_steps": 200}, {"save_strategy": "no"}, {"save_steps": 30}]
)
def test_evaluation_steps_must_match_checkpoint_steps(options: dict[str, Any], tmp_path: Path) -> None:
    training = TrainingOptions(output_dir=str(tmp_path), **options)
    assert not training.load_best_model_at_end or training.save_strategy == training.eval_strategy


def test_tracking_goes_to_wandb_when_a_key_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert TrainingOptions(output_dir=str(tmp_path)).report_to == ["wandb"]
    monkeypatch.delenv("WANDB_API_KEY")
    assert TrainingOptions(output_dir=str(tmp_path)).report_to == ["tensorboard"]


def test_the_evaluation_batch_defaults_to_the_training_batch(tmp_path: Path) -> None:
    sizes = {"output_dir": str(tmp_path), "per_device_train_batch_size": 3, "use_cpu": True}
    assert TrainingOptions(**sizes).per_device_eval_batch_size == 3
    assert TrainingOptions(**sizes, per_device_eval_batch_size=8).per_device_eval_batch_size == 8


@pytest.mark.parametrize("layout", ["frames", "trajectory"])
def test_evaluation_does_not_depend_on_the_batch_size(
    layout: str, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset), layout=layout, max_decisions=3)
    rows = load_dataset(toy_dataset / "eval.jsonl", data, cache_dir=tmp_path / "cache")
    collator = make_collator(open_checkpoint(tiny_model).processor, layout=layout, dataset_folder=Path())
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning="full")

    def evaluate(batch_size: int) -> dict[str, float]:
        training = TrainingOptions(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=batch_size,
            use_cpu=True,
            report_to="none",
            dataloader_num_workers=0,
        )
        trainer = PokemonTrainer(
            model=load_trainable(options.open_checkpoint(), options, training),
            args=training,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collator,
            processing_class=collator.processor,
        )
        results = trainer.evaluate()
        return {name: results[name] for name in ("eval_loss", "eval_button_accuracy")}

    alone = evaluate(1)
    assert evaluate(3) == pytest.approx(alone, rel=1e-5)
    assert evaluate(8) == pytest.approx(alone, rel=1e-5)


class FullDisk(TrainerCallback):
    """Let no file grow beyond 100 KiB once the first checkpoint is complete, as a full disk would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, resource.RLIM_INFINITY))


@pytest.mark.slow(4)
def test_a_run_whose_disk_is_full_keeps_its_checkpoint_and_continues(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = {"dataset": toy_dataset, "model": tiny_model, "output": tmp_path, "options": {"finetuning": "lora"}}
    changes = {"max_steps": 3, "save_steps": 1, "eval_strategy": "no", "save_strategy": "steps", "report_to": "none"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(PokegemmaError) as caught:
            run_training(**arguments, **changes, callbacks=[FullDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for part in (str(tmp_path), "checkpoint-1 is complete", "--resume_from_checkpoint"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert run_training(**arguments, **changes, resume_from_checkpoint="last")
    assert read_run_record(tmp_path)["status"] == "completed"
