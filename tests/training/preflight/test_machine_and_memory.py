import shutil
from pathlib import Path

import pytest

from benchmarks.decision_cost import GEMMA_3_4B
from pokegemma.environment import GIB, Gpu, Hardware
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.training.preflight import disk, machine, memory, token_lengths
from pokegemma.training.preflight.memory import ModelSize
from pokegemma.training.preflight.token_lengths import TokenLengths
from tests.datasets import make_sample, write_split

LENGTHS = TokenLengths(longest=920, longest_prompt_text=150, longest_answer=100, most_pictures=1, total=920, num_rows=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=16)
    return folder


def hardware(*gpus, memory_gib=16.0):
    return Hardware(gpus=gpus, mps=False, num_cores=2, memory_gib=memory_gib, torch_is_cpu_build=False)


def test_this_environment_passes():
    check = machine.check_environment()
    assert check.status == "PASS"
    assert "torch 2" in check.summary


def test_a_package_outside_its_range_fails(monkeypatch):
    requires = ["torch>=99", "no-such-package>=1", 'pillow>=999 ; sys_platform == "nowhere"', "numpy>=2"]
    monkeypatch.setattr(machine.metadata, "requires", lambda _: requires)
    check = machine.check_environment()
    assert check.status == "FAIL"
    assert len(check.details) == 2
    assert check.details[0].endswith("is not >=99")
    assert check.details[1] == "no-such-package is not installed"


def test_no_gpu_is_a_warning_and_a_gpu_that_torch_cannot_use_is_a_failure(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert machine.check_hardware(hardware()).status == "WARN"
    check = machine.check_hardware(hardware(Gpu("H200", 139.0)))
    assert check.status == "FAIL"
    assert "cannot use the GPU" in check.summary


def test_a_gpu_with_bfloat16_passes(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "is_bf16_supported", lambda **_: True)
    assert machine.check_hardware(hardware(Gpu("H200", 139.0))).status == "PASS"
    monkeypatch.setattr(machine.torch.cuda, "is_bf16_supported", lambda **_: False)
    assert machine.check_hardware(hardware(Gpu("T4", 15.0))).status == "WARN"


def test_a_disk_must_have_room_for_all_folders_on_it_together(tmp_path):
    half = int(shutil.disk_usage(tmp_path).free * 0.6)
    assert disk.check_disk({tmp_path / "not" / "yet": half}).status == "PASS"
    assert disk.check_disk({tmp_path / "one": half, tmp_path / "two": half}).status == "FAIL"
    assert "unknown" in disk.check_disk({tmp_path: None}).summary


def test_a_folder_that_cannot_be_made_fails_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    check = disk.check_disk({tmp_path / "file" / "outputs": None})
    assert (check.status, check.summary) == ("FAIL", f"{tmp_path / 'file'} is not writable (Not a directory)")
    if Path("/proc").is_dir():
        assert "/proc is not writable" in disk.check_disk({Path("/proc/foo"): None}).summary
    disk.check_disk({tmp_path: None})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_one_step_takes_the_disk_of_an_adapter_or_a_whole_model():
    size = ModelSize(num_weights=1000, num_text_weights=800, linears=((10, 10),))
    assert disk.step_bytes(size, finetuning="qlora", lora_r=16, bytes_per_weight=2) == 4 * 20 * 16
    assert disk.step_bytes(size, finetuning="full", lora_r=16, bytes_per_weight=2) == 2000


def count(folder, tiny, *, max_length=None, max_positions=8192, layout="frames"):
    split = write_split(folder / "train.jsonl", [make_sample("s", 1, "up"), make_sample("s", 2, "up", ["up"])])
    collators = {
        "train": Gemma3Collator(processor=open_checkpoint(tiny).processor, layout=layout, dataset_folder=folder)
    }
    check, lengths = token_lengths.check_token_lengths(
        [split], collators, max_positions=max_positions, max_length=max_length
    )
    batch = collators["train"](list(split.samples())) if layout == "frames" else None
    return check, lengths, batch


def test_token_lengths_are_those_of_the_batch(tmp_path, tiny):
    check, lengths, batch = count(tmp_path, tiny)
    assert check.status == "PASS"
    assert lengths.longest == batch["input_ids"].shape[1]
    assert lengths.total == batch["attention_mask"].sum()


def test_a_sample_longer_than_max_length_or_the_model_fails_and_is_named(tmp_path, tiny):
    longest = count(tmp_path, tiny)[1].longest
    assert count(tmp_path, tiny, max_length=longest)[0].status == "PASS"
    for limits in ({"max_length": longest - 1}, {"max_positions": longest - 1}):
        check, *_ = count(tmp_path, tiny, **limits)
        assert check.status == "FAIL"
        assert check.details[-1] == f"train.jsonl:2 (s/2): {longest} tokens, more than {longest - 1}"


def test_the_grid_layout_without_grid_pictures_fails(tmp_path, tiny):
    check, *_ = count(tmp_path, tiny, layout="grid")
    assert check.status == "FAIL"
    assert "use --layout frames" in check.details[0]


def test_a_prompt_over_its_budget_warns(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(token_lengths, "MAX_PROMPT_TOKENS", 20)
    assert count(tmp_path, tiny)[0].status == "WARN"


def test_without_samples_token_lengths_are_skipped(tmp_path, tiny):
    split = write_split(tmp_path / "train.jsonl", [])
    collators = {
        "train": Gemma3Collator(processor=open_checkpoint(tiny).processor, layout="grid", dataset_folder=tmp_path)
    }
    check, lengths = token_lengths.check_token_lengths([split], collators, max_positions=100, max_length=None)
    assert (check.status, lengths) == ("SKIP", None)


def test_the_4b_model_has_the_published_number_of_weights():
    size = memory.measure_model(GEMMA_3_4B)
    assert size.num_weights == 4_300_079_472
    assert size.num_lora_weights(16) == 29_802_496


def estimate(finetuning, **changes):
    options = {"lengths": LENGTHS, "lora_r": 16, "batch_size": 4, "bytes_per_weight": 2, **changes}
    parts = memory.estimate_memory(GEMMA_3_4B, memory.measure_model(GEMMA_3_4B), finetuning=finetuning, **options)
    return parts, sum(parts.values()) / GIB


def test_the_defaults_are_estimated_to_fit_24_gb_and_full_fine_tuning_is_not():
    parts, total = estimate("qlora")
    assert parts["weights"] / GIB == pytest.approx(3.57, abs=0.01)
    assert 8 < total < 20
    assert total < estimate("lora")[1] < 24 < estimate("full")[1]
    assert estimate("qlora", batch_size=8)[1] > total


def test_an_evaluation_counts_where_its_batch_needs_more_than_training():
    parts, total = estimate("lora", batch_size=1)
    assert estimate("lora", batch_size=1, eval_batch_size=1) == (parts, total)
    evaluation = estimate("lora", batch_size=1, eval_batch_size=8)[0]
    assert evaluation["logits"] == 8 * 102 * 262208 * 4 * 3
    assert evaluation["vision tower"] == 8 * parts["vision tower"]
    assert evaluation["activations"] < 8 * parts["activations"]


def test_memory_is_compared_with_the_smallest_gpu_or_the_machine():
    parts = {"weights": 10 * GIB}
    check = memory.check_memory(parts, hardware(Gpu("A", 24.0), Gpu("B", 8.0)), what="lora")
    assert (check.status, check.details) == ("FAIL", ("weights: 10.00 GiB",))
    assert check.summary.startswith("lora: about 10.0 of the GPU's 8.0 GiB")
    assert memory.check_memory(parts, hardware(Gpu("A", 24.0)), what="lora").status == "PASS"
    assert memory.check_memory(parts, hardware(Gpu("A", 11.0)), what="lora").status == "WARN"
    assert memory.check_memory(parts, hardware(Gpu("MIG slice", None)), what="lora").status == "WARN"
    assert memory.check_memory(parts, hardware(memory_gib=9.0), what="lora").status == "FAIL"


def test_a_full_run_takes_more_disk_than_an_adapter():
    size = ModelSize(num_weights=1000, num_text_weights=800, linears=((10, 10),))
    assert disk.run_bytes(size, finetuning="lora", lora_r=16, bytes_per_weight=2) == 3 * 16 * 20 * 16 + 2000
    assert disk.run_bytes(size, finetuning="full", lora_r=16, bytes_per_weight=2) == 3 * (4800 + 2000) + 2000
