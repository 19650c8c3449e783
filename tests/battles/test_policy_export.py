"""Policies merged and as GGUF: the same logits, the same words from llama.cpp, and one clear line for what is wrong."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.cloning.verification import recorded_decisions
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.parity import choose_prompts
from pokegemma.battles.policy.scoring import score_actions
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.gguf_check import check_gguf_files
from pokegemma.export.gguf_reader import read_gguf
from pokegemma.export.gguf_source import read_gguf_source
from pokegemma.export.llama_cpp_converter import find_converter
from pokegemma.export.merge import merge
from pokegemma.gemma.text.checkpoint import PLAIN_CHAT_TEMPLATE
from pokegemma.provenance import read_run_record
from pokegemma.serving.client import list_models
from pokegemma.serving.engine_command_lines import ServerOptions, build_launch
from tests.battles.adapters import write_random_adapter
from tests.processes import WAIT_S, call_script, free_port, wait_until


def scores_of(path: Path, prompts: list[str]) -> torch.Tensor:
    policy = open_policy(path)
    return score_actions(policy.load_model(), policy.encode(prompts), policy.action_tokens)


@pytest.fixture(scope="module")
def merged(spelled_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the adapter merged by the script, verified on the battles that its run.json names."""
    folder = tmp_path_factory.mktemp("merged") / "policy"
    options = ("--lora_path", spelled_adapter, "--output_path", folder, "--dtype", "float32", "--verify")
    done = call_script("merge_qlora", *options, "--num_samples", 5)
    assert done.returncode == 0, done.stderr
    assert "logits on the answers of 5 samples" in done.stdout
    return folder


@pytest.fixture(scope="module")
def prompts(spelled_policy: Path, packed_battles: Path) -> list[str]:
    return choose_prompts(spelled_policy, packed_battles, count=6)


# --- merging


@pytest.mark.slow(12)
def test_a_merged_policy_scores_as_its_adapter(merged, spelled_adapter, spelled_policy, prompts) -> None:
    expected = scores_of(spelled_adapter, prompts)
    assert (scores_of(merged, prompts) - expected).abs().max() < 1e-4
    assert (scores_of(spelled_policy, prompts) - expected).abs().max() > 0.1
    facts = read_run_record(merged)
    assert facts["verification"]["adapter_effect"] > 0.01
    assert facts["verification"]["stored_error"] < 1e-5
    assert facts["weights"] == {"changed": 6 * 4, "unchanged": 6 * 9 + 3}


@pytest.mark.slow(12)
def test_a_merged_policy_has_all_that_converting_and_serving_need(merged, spelled_policy) -> None:
    assert (merged / "tokenizer.model").read_bytes() == (spelled_policy / "tokenizer.model").read_bytes()
    assert (merged / "chat_template.jinja").read_text() == PLAIN_CHAT_TEMPLATE
    assert "added_tokens_decoder" in json.loads((merged / "tokenizer_config.json").read_text())
    assert set(load_file(merged / "model.safetensors")) == set(load_file(spelled_policy / "model.safetensors"))


@pytest.mark.slow(12)
def test_the_chat_template_is_the_prompt_of_training(merged, prompts) -> None:
    policy = open_policy(merged)
    for content in (prompts[0], [{"type": "text", "text": prompts[0]}]):
        text = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == policy.encode([prompts[0]])[0]


@pytest.mark.slow(12)
def test_a_merged_policy_reads_the_text_of_its_training(spelled_adapter, tmp_path) -> None:
    adapter = Path(shutil.copytree(spelled_adapter, tmp_path / "adapter"))
    record = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps(record | {"options": {"text": "words"}}))
    merge(adapter, tmp_path / "merged", dtype="float32")
    assert open_policy(tmp_path / "merged").text == "words"


@pytest.mark.slow(12)
def test_a_policy_is_verified_on_battles_and_a_model_with_vision_on_samples(
    spelled_adapter, packed_battles, toy_dataset, tiny_model, tmp_path
) -> None:
    with pytest.raises(PokegemmaError, match=r"eval\.jsonl: samples with pictures"):
        merge(spelled_adapter, tmp_path / "m", verify_on=toy_dataset / "eval.jsonl")
    decisions = recorded_decisions(spelled_adapter, packed_battles, base=None, count=2)
    assert len(decisions.examples) == 2
    adapter = Path(shutil.copytree(spelled_adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("run.json")))
    with pytest.raises(PokegemmaError, match="is not a Gemma 3 for text alone, and cannot be verified on battles"):
        merge(adapter, tmp_path / "m", base=str(tiny_model), verify_on=decisions)
    assert not (tmp_path / "m").exists()


def test_an_adapter_that_changes_nothing_is_not_merged(spelled_policy, tmp_path) -> None:
    write_random_adapter(tmp_path, spelled_policy, std=0)
    with pytest.raises(CheckFailedError, match="the adapter changes nothing"):
        merge(tmp_path, tmp_path / "m", base=str(spelled_policy))


# --- GGUF


@pytest.mark.slow(12)
def test_a_policy_becomes_one_file_for_each_type(policy_gguf: Path, spelled_policy: Path) -> None:
    assert sorted(path.name for path in policy_gguf.iterdir()) == ["model-f16.gguf", "model-q8_0.gguf", "run.json"]
    record = read_run_record(policy_gguf)
    assert (record["model_type"], record["image_tokens"]) == ("gemma3_text", None)
    file = read_gguf(policy_gguf / "model-f16.gguf", find_converter(None))
    assert len(file.shapes) == 6 * 13 + 2
    assert file.fields["tokenizer.chat_template"] == PLAIN_CHAT_TEMPLATE
    assert {"<bos>", "<eos>"} <= file.control_tokens


@pytest.mark.slow(12)
def test_what_got_lost_is_noticed(policy_gguf: Path, spelled_policy: Path) -> None:
    source = read_gguf_source(spelled_policy)
    file = read_gguf(policy_gguf / "model-f16.gguf", find_converter(None))
    check_gguf_files(source, {"f16": file}, None)
    fewer = replace(
        file,
        shapes=dict(list(file.shapes.items())[1:]),
        fields=file.fields | {"tokenizer.chat_template": "{{ x }}"},
        control_tokens=file.control_tokens - {"<bos>"},
    )
    with pytest.raises(CheckFailedError) as caught:
        check_gguf_files(source, {"f16": fewer}, None)
    for part in ("79, the checkpoint has 80", "its chat template is not", "<bos> would be read as text"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layer_types": ["sliding_attention"] * 5 + ["sliding_attention"]}, "order of layers"),
        ({"query_pre_attn_scalar": 17}, "head_dim 16, not by query_pre_attn_scalar 17"),
        ({"rope_parameters": {"full": {}}}, "positions of its sliding layers"),
        ({"quantization_config": {"quant_method": "x"}}, "its weights are quantised"),
    ],
)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(spelled_policy, tmp_path, changes, error) -> None:
    folder = Path(shutil.copytree(spelled_policy, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in changes:
        changes = {"rope_parameters": config["rope_parameters"]}
        changes["rope_parameters"]["sliding_attention"]["rope_theta"] = 20_000.0
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(PokegemmaError, match=error):
        read_gguf_source(folder)


def test_whole_words_cannot_be_converted(tiny_policy: Path) -> None:
    with pytest.raises(PokegemmaError, match="its tokens are whole words"):
        read_gguf_source(tiny_policy)


def test_a_config_for_text_alone_over_weights_with_vision_is_refused(tiny_model, spelled_policy, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    shutil.copy(spelled_policy / "config.json", folder)
    with pytest.raises(PokegemmaError, match="its weights contain vision"):
        read_gguf_source(folder)


def compare(policy: Path, gguf: Path, battles: Path, *more: str):
    return call_script(
        "battles_parity",
        *("--policy_path", policy, "--gguf_path", gguf, "--trajectories_dir", battles, "--num_prompts", 6, *more),
    )


@pytest.mark.slow(12)
def test_llama_cpp_writes_the_same_words(policy_gguf, spelled_policy, packed_battles) -> None:
    done = compare(spelled_policy, policy_gguf / "model-f16.gguf", packed_battles, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["num_prompts"], record["same_tokens"], record["same_actions"]) == (6, 1.0, 1.0)
    assert record["same_words"] == 1.0 and record["texts"] == []
    assert record["max_difference"] < 0.05


@pytest.mark.slow(12)
def test_another_policy_is_told_from_it(policy_gguf, spelled_policy, packed_battles, tmp_path) -> None:
    other = Path(shutil.copytree(spelled_policy, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    for name in weights:
        if "down_proj" in name:
            weights[name] = -weights[name]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    done = compare(other, policy_gguf / "model-f16.gguf", packed_battles)
    assert done.returncode == 1
    assert "have the same action, not 95.0%" in done.stderr


# --- serving


@contextlib.contextmanager
def running(gguf: Path) -> Iterator[str]:
    """Run llama-cpp-python's server for a file, and yield its URL."""
    options = ServerOptions(port=free_port(), log_probabilities=20)
    launch = build_launch("llama.cpp", str(gguf), options)
    assert not any("mmproj" in word or word == "mtmd" for word in launch.command)
    process = subprocess.Popen(launch.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            assert process.poll() is None
            with contextlib.suppress(PokegemmaError):
                return bool(list_models(launch.url, timeout_s=WAIT_S))
            return False

        wait_until(answers)
        yield launch.url
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow(12)
def test_a_served_policy_plays_as_its_checkpoint(policy_gguf: Path, spelled_policy: Path, simulator) -> None:
    from pokegemma.battles.players.policy_player import load_policy_player
    from pokegemma.battles.players.scripted import RandomBattlePlayer
    from pokegemma.battles.players.served import ServedPlayer
    from tests.battles.simulated import make_specs, play

    with running(policy_gguf / "model-f16.gguf") as url:
        served = ServedPlayer("policy", url)
        results = [
            play(simulator, make_specs(1), (player, RandomBattlePlayer()), max_turns=6)
            for player in (served, load_policy_player(spelled_policy, "policy", device="cpu"))
        ]
    seats = [next(iter(result.values())).seats[0] for result in results]
    steps = [[step.action for step in seat.steps] for seat in seats]
    assert steps[0] == steps[1] and len(steps[0]) >= 6
    assert seats[0].num_unanswered < len(steps[0])
