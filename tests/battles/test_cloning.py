"""Behaviour cloning: which decisions are rows, where the loss is, accuracy, and whole runs of the tiny policy."""

import json
import shlex
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from datasets import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from pokegemma.battles.cloning.baselines import measure_baselines
from pokegemma.battles.cloning.batches import ScoringBatches, TrainingBatches
from pokegemma.battles.cloning.options import CloningOptions, CloningTrainingOptions
from pokegemma.battles.cloning.rows import load_rows, make_rows, pack_legal, spread, unpack_legal
from pokegemma.battles.cloning.selection import BattleFilter, choose_split, select_battles
from pokegemma.battles.cloning.time_limit import TimeLimit
from pokegemma.battles.cloning.trainer import CloningTrainer, judge_scores
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.training_run import find_evaluation
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from tests.processes import call_script

LOSS = "gen1ou/made-gen1ou-0_1500_A_vs_B_11-05-2026_LOSS.json.lz4"
WIN = "gen9ou/made-gen9ou-0_Unrated_A_vs_B_11-05-2026-23:59:59_WIN.json.lz4"


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, [True, True]),
        ({"won_only": True}, [False, True]),
        ({"min_rating": 1001}, [True, False]),
        ({"formats": ("gen9ou",)}, [False, True]),
        ({"since": datetime(2026, 11, 6)}, [False, False]),
        ({"until": datetime(2026, 11, 5)}, [True, True]),
        ({"until": datetime(2026, 11, 4)}, [False, False]),
    ],
)
def test_a_filter_reads_names(changes, accepted) -> None:
    assert [BattleFilter(**changes).accepts(path) for path in (LOSS, WIN)] == accepted


def test_both_views_of_a_battle_are_in_one_split(packed_battles: Path) -> None:
    battles = PackedTrajectories(packed_battles)
    chosen = {
        split: list(select_battles(battles, BattleFilter(), eval_fraction=0.3, split=split))
        for split in ("train", "eval")
    }
    assert sorted(chosen["train"] + chosen["eval"]) == list(range(24))
    ids = {split: {battles.name(index).split("_")[0] for index in indices} for split, indices in chosen.items()}
    assert ids["train"] & ids["eval"] == set()
    assert 0 < len(ids["eval"]) < 8
    assert {choose_split(str(number), eval_fraction=0) for number in range(50)} == {"train"}


def test_legal_actions_are_one_number() -> None:
    legal = np.zeros(13, dtype=bool)
    legal[[0, 3, 12]] = True
    assert pack_legal(legal) == 0b1000000001001
    assert unpack_legal(0b1000000001001).tolist() == legal.tolist()


def test_a_row_is_prompt_and_action(packed_battles: Path, tiny_policy: Path) -> None:
    battles, policy = PackedTrajectories(packed_battles), open_policy(tiny_policy)
    rows = list(make_rows(battles, [3], policy))
    battle = battles[3]
    assert len(rows) == 7
    words = policy.tokenizer.convert_ids_to_tokens(rows[2]["input_ids"])
    assert " ".join(words[1:-2]) == battles.short_texts(3)[2]
    assert words[-2:] == ["action", f"<{battle.actions[2]}>"]
    assert (rows[2]["num_answer"], rows[2]["action"]) == (1, battle.actions[2])
    assert unpack_legal(rows[2]["legal"]).tolist() == battle.legal[2].tolist()


class OneBattle:
    """A battle whose second action was not revealed and whose third state allows one action."""

    words = ()

    def __init__(self, battle) -> None:
        self._battle = battle

    def __getitem__(self, index: int):
        return self._battle

    def short_texts(self, index: int) -> list[str]:
        return ["gen1ou"] * len(self._battle.actions)


def test_decisions_without_choice_or_action_are_left_out(packed_battles: Path, tiny_policy: Path) -> None:
    battle = PackedTrajectories(packed_battles)[0]
    actions, legal = battle.actions.copy(), battle.legal.copy()
    actions[1] = -1
    legal[2] = False
    legal[2, actions[2]] = True
    changed = OneBattle(type(battle)(battle.words, battle.numbers, actions, legal, battle.rewards))
    rows = list(make_rows(changed, [0], open_policy(tiny_policy)))
    assert [row["action"] for row in rows] == [actions[0], *actions[3:7].tolist()]


def test_the_loss_is_on_the_action_only() -> None:
    rows = [
        {"input_ids": [2, 7, 8, 9], "num_answer": 2, "action": 1, "legal": 3},
        {"input_ids": [2, 9], "num_answer": 1, "action": 0, "legal": 3},
    ]
    batch = TrainingBatches(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9], [0, 0, 2, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9], [-100, -100, -100, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    scoring = ScoringBatches(pad_id=0)(rows)
    assert scoring["input_ids"].tolist() == [[2, 7], [2, 0]]
    assert (scoring["lengths"].tolist(), scoring["actions"].tolist()) == ([2, 1], [1, 0])


def test_accuracy_is_that_of_the_likeliest_legal_action() -> None:
    scores = torch.full((3, 13), -9.0)
    scores[:, 12], scores[:, 4] = -0.1, -0.5
    legal = torch.ones(3, 13, dtype=torch.bool)
    legal[:, 9:] = False
    legal[2, 12] = True
    judged = judge_scores(scores, actions=torch.tensor([4, 0, 12]), legal=legal)
    assert judged.tolist() == [
        [1, 1, pytest.approx(0.5), 1, 1],
        [0, 1, pytest.approx(9.0), 0, 0],
        [1, 1, pytest.approx(0.1), 0, 0],
    ]


def test_baselines_need_no_model(packed_battles: Path, tiny_policy: Path, tmp_path) -> None:
    battles, options = PackedTrajectories(packed_battles), CloningOptions(str(packed_battles), eval_fraction=0.3)
    train, held_out = (
        load_rows(battles, options, open_policy(tiny_policy), split, cache_dir=tmp_path) for split in ("train", "eval")
    )
    result = measure_baselines(train, held_out)
    legal = [unpack_legal(number) for number in held_out["legal"]]
    assert result["uniform_legal"] == pytest.approx(np.mean([1 / row.sum() for row in legal]))
    counts = np.bincount(train["action"], minlength=13)
    hits = [
        max(np.flatnonzero(row), key=lambda a: (counts[a], -a)) == action
        for row, action in zip(legal, held_out["action"], strict=True)
    ]
    assert result["majority"] == pytest.approx(np.mean(hits))
    assert len(spread(held_out, 5)) == 5


def test_a_filter_that_leaves_nothing_is_an_error(packed_battles: Path, tiny_policy: Path, tmp_path) -> None:
    options = CloningOptions(str(packed_battles), min_rating=9000)
    with pytest.raises(PokegemmaError, match="no decision to learn from"):
        load_rows(PackedTrajectories(packed_battles), options, open_policy(tiny_policy), "train", cache_dir=tmp_path)


@pytest.mark.parametrize(("option", "value"), [("since", "2026-11-05"), ("eval_fraction", 1.0), ("min_rating", -1)])
def test_wrong_options_are_refused(option, value) -> None:
    with pytest.raises(PokegemmaError, match=f"--{option} {value}"):
        CloningOptions("x", **{option: value})


@pytest.mark.parametrize("num_items", [None, 7])
def test_the_loss_and_its_gradients_are_those_of_trl(tiny_policy: Path, tmp_path, num_items) -> None:
    policy = open_policy(tiny_policy)
    rows = [
        {"input_ids": [2, *range(20, 20 + length), 5, 6], "num_answer": num_answer, "action": 0, "legal": 3}
        for length, num_answer in ((9, 1), (4, 2), (12, 1))
    ]
    trainer = CloningTrainer(
        model=policy.load_model(),
        args=CloningTrainingOptions(output_dir=str(tmp_path), report_to="none", use_cpu=True, eval_strategy="no"),
        train_dataset=Dataset.from_list(rows),
        data_collator=TrainingBatches(pad_id=0),
        processing_class=policy.tokenizer,
        action_tokens=policy.action_tokens,
    )
    losses, gradients = [], []
    for compute in (trainer.compute_loss, super(CloningTrainer, trainer).compute_loss):
        trainer.model.train().zero_grad()
        loss = compute(trainer.model, trainer.data_collator(rows), num_items_in_batch=num_items)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_the_tiny_model_knows_the_words_of_the_battles(packed_battles: Path, tmp_path) -> None:
    done = call_script("battles_tiny_model", "--trajectories_dir", packed_battles, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    policy, battles = open_policy(tmp_path / "out"), PackedTrajectories(packed_battles)
    assert set(battles.words) <= set(policy.tokenizer.get_vocab())
    assert str(policy.load_model().num_parameters()) in done.stdout.replace(",", "")


TRAINING = shlex.split(
    "--per_device_train_batch_size 16 --learning_rate 1e-2 --eval_fraction 0.3 --report_to none --logging_steps 1 "
    "--eval_steps 2 --save_steps 2 --lr_scheduler_type constant --warmup_steps 0"
)


def train(packed: Path, model: Path, output: Path, *more: str) -> dict:
    options = ("--trajectories_dir", packed, "--model_name_or_path", model, "--output_dir", output)
    done = call_script("sft_battles", *options, *TRAINING, *more)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "run.json").read_text())


@pytest.mark.slow(8)
def test_training_writes_a_policy_and_resumes_exactly(packed_battles: Path, tiny_policy: Path, tmp_path) -> None:
    record = train(packed_battles, tiny_policy, tmp_path / "whole", "--finetuning", "full", "--max_steps", "4")
    assert record["status"] == "completed"
    assert record["accuracy"]["loss"] < 6
    assert set(record["baselines"]) == {"uniform_legal", "majority"}
    assert record["num_trained_weights"] > 150_000
    whole = open_policy(tmp_path / "whole")
    assert whole.text == "short"
    train(packed_battles, tiny_policy, tmp_path / "part", "--finetuning", "full", "--max_steps", "2")
    train(
        packed_battles,
        tiny_policy,
        tmp_path / "part",
        *("--finetuning", "full", "--max_steps", "4", "--resume_from_checkpoint"),
    )
    weights = whole.load_model().state_dict()
    resumed = open_policy(tmp_path / "part").load_model().state_dict()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow(5)
def test_training_ends_when_its_time_is_over(packed_battles: Path, tiny_policy: Path, tmp_path) -> None:
    limit = ("--finetuning", "full", "--max_steps", "50", "--max_minutes", "0.0001")
    record = train(packed_battles, tiny_policy, tmp_path / "out", *limit)
    assert (record["status"], record["global_step"]) == ("completed", 1)
    assert record["accuracy"]["action_accuracy"] > 0
    assert open_policy(tmp_path / "out").load_model().num_parameters() > 150_000


def test_the_time_of_a_resumed_run_counts_from_its_checkpoint() -> None:
    limit = TimeLimit(10)
    saved = {"TimeLimit": {"attributes": {"used_s": 599.99}}}
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", eval_strategy="no")
    for step, earlier, stops in ((0, {}, False), (3, saved, True)):
        state, control = TrainerState(global_step=step, max_steps=9), TrainerControl()
        state.stateful_callbacks = earlier
        limit.on_train_begin(arguments, state, control)
        time.sleep(0.02)
        limit.on_step_end(arguments, state, control)
        assert control.should_training_stop is stops
    assert limit.state()["attributes"]["used_s"] > 600


@pytest.mark.slow(6)
@pytest.mark.parametrize("finetuning", ["lora", "qlora"])
def test_an_adapter_of_the_tiny_policy_is_trained(
    finetuning: str, packed_battles: Path, tiny_policy: Path, tmp_path
) -> None:
    more = ("--finetuning", finetuning, "--max_steps", "2", "--report_to", "tensorboard")
    record = train(packed_battles, tiny_policy, tmp_path / "out", *more)
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert record["num_trained_weights"] < 150_000
    policy = open_policy(tmp_path / "out")
    assert policy.adapter is not None
    assert len(policy.adapter.layers) == 3 * 7
    policy.load_model()
    for option, change in (("lora_r", ("16", "4")), ("learning_rate", ("0.01", "0.02"))):
        other = call_script(
            "sft_battles",
            *("--trajectories_dir", packed_battles, "--model_name_or_path", tiny_policy),
            *("--output_dir", tmp_path / "out", *TRAINING, "--finetuning", finetuning),
            *(f"--{option}", change[1], "--max_steps", "4", "--resume_from_checkpoint"),
        )
        assert other.returncode == 2
        assert f"{option} was {change[0]}, is {change[1]}" in other.stderr


def test_the_evaluation_of_a_run_is_that_of_the_model_that_is_saved() -> None:
    entries = [{"step": step, "eval_loss": loss} for step, loss in ((1, 0.5), (2, 0.2), (3, 0.4))]
    for loads_best, expected in ((True, 0.2), (False, 0.4)):
        trainer = SimpleNamespace(
            args=SimpleNamespace(load_best_model_at_end=loads_best),
            state=SimpleNamespace(log_history=[*entries, {"step": 3, "loss": 1.0}], best_global_step=2),
        )
        assert find_evaluation(trainer, "eval_loss")["eval_loss"] == expected
    assert find_evaluation(trainer, "eval_other") is None
