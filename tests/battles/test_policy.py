"""Policies: prompts, the tokens of actions, the tiny model, and scores in one pass against one pass an action."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from peft import LoraConfig, get_peft_model

from benchmarks.battles_reading import make_battle
from benchmarks.battles_scoring import make_policies, make_texts, measure, score_one_by_one
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.policy.prompts import ANSWERS, join_prompt, write_prompt
from pokegemma.battles.policy.scoring import score_actions
from pokegemma.battles.policy.tiny import make_tiny_policy, make_word_tokenizer
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.loading import open_checkpoint


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return make_texts(12)


@pytest.fixture(scope="module")
def policies(texts, tmp_path_factory) -> dict[str, PolicyCheckpoint]:
    return make_policies(tmp_path_factory.mktemp("policies"), texts)


def test_a_prompt_ends_with_the_question() -> None:
    state = make_battle(random.Random(0), 2).states[0]
    short, words = write_prompt(state, "short").split(" "), write_prompt(state, "words").split(" ")
    assert (short[0], short[-1]) == ("gen1ou", "action")
    assert (words[0], words[-1], len(words)) == ("<gen1ou>", "action", 88)


def test_each_action_is_a_word_of_the_tiny_tokenizer(policies) -> None:
    tokens = policies["words"].action_tokens
    assert tokens.prefix == ()
    assert [len(branch) for branch in tokens.branches] == [1] * 13
    assert ANSWERS[12] == " <12>"


def test_an_action_may_be_several_tokens(policies) -> None:
    tokens = policies["pieces"].action_tokens
    assert len(tokens.prefix) > 0
    assert {len(branch) for branch in tokens.branches} == {1, 2}


def test_a_prompt_begins_with_one_bos(policies, texts) -> None:
    for policy in policies.values():
        (ids,) = policy.encode([join_prompt(texts[0])])
        assert ids.count(policy.tokenizer.bos_token_id) == 1
        assert ids[0] == policy.tokenizer.bos_token_id
    assert policies["words"].encode([]) == []


def test_an_unknown_word_is_one_token() -> None:
    tokenizer = make_word_tokenizer(["foe"])
    ids = tokenizer("foe nobody action", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["foe", "<unk>", "action"]


def test_the_tiny_model_has_the_size_of_the_plan(tmp_path) -> None:
    model = make_tiny_policy(tmp_path, [f"word{number}" for number in range(300)])
    assert 157_000 <= model.num_parameters() <= 173_000
    assert model.config.model_type == "gemma3_text"


@pytest.mark.parametrize("tokenizer", ["words", "pieces"])
def test_scores_in_one_pass_are_those_of_one_pass_an_action(policies, texts, tokenizer) -> None:
    policy = policies[tokenizer]
    model = policy.load_model()
    prompts = policy.encode([join_prompt(words[: len(words) - number]) for number, words in enumerate(texts)])
    assert len({len(prompt) for prompt in prompts}) > 4
    plain = score_one_by_one(model, prompts, policy.action_tokens, batch_size=1)
    for batch_size in (1, 5, 64):
        fast = score_actions(model, prompts, policy.action_tokens, batch_size=batch_size)
        assert (fast - plain).abs().max() <= 1e-5
    assert (plain[0] - plain[-1]).abs().max() > 1e-3  # they depend on the prompt


def test_a_window_shorter_than_the_prompt_is_respected(texts, tmp_path) -> None:
    policy = make_policies(tmp_path, texts)["pieces"]
    settings = json.loads((tmp_path / "pieces" / "config.json").read_text())
    (tmp_path / "pieces" / "config.json").write_text(json.dumps(settings | {"sliding_window": 16}))
    policy = open_policy(tmp_path / "pieces")
    model, prompts = policy.load_model(), policy.encode([join_prompt(words) for words in texts[:4]])
    plain = score_one_by_one(model, prompts, policy.action_tokens, batch_size=2)
    assert (score_actions(model, prompts, policy.action_tokens) - plain).abs().max() <= 1e-5


def test_the_benchmark_compares_both_ways(policies, texts) -> None:
    rates = measure(policies["words"], texts[:2], repeats=1)
    assert {name: len(values) for name, values in rates.items()} == {"one pass an action": 1, "one pass": 1}


def test_an_adapter_is_attached_to_its_base(tiny_policy: Path, tmp_path) -> None:
    base = open_policy(tiny_policy)
    model = get_peft_model(base.load_model(), LoraConfig(r=4, target_modules=r"model\.layers\..*\.(q_proj|up_proj)"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    policy = open_policy(tmp_path, base=str(tiny_policy))
    prompts = base.encode(["gen1ou foes6 action"])
    scores = score_actions(policy.load_model(), prompts, policy.action_tokens)
    assert torch.allclose(scores, score_actions(model, prompts, base.action_tokens), atol=1e-6)
    assert (scores - score_actions(base.load_model(), prompts, base.action_tokens)).abs().max() > 1e-2


def test_the_adapter_of_other_weights_is_refused(tiny_policy: Path, tmp_path) -> None:
    base = open_policy(tiny_policy)
    get_peft_model(base.load_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"stage": "train", "base_fingerprint": "2:other"}))
    with pytest.raises(PokegemmaError, match="is not the base of the adapter"):
        open_policy(tmp_path, base=str(tiny_policy))


def test_a_model_with_vision_is_no_policy(tiny_model: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"'gemma3' is not a Gemma 3 for text alone"):
        open_policy(tiny_model)


def test_a_policy_is_not_trained_on_pictures(tiny_policy: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"for text alone \('gemma3_text'\), without a vision tower"):
        open_checkpoint(tiny_policy)


def test_a_tokenizer_that_does_not_tell_actions_apart_is_refused(tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match="same tokens"):
        ButtonTokens.of_answers(open_policy(tiny_policy).tokenizer, ["unknown", "words"])
