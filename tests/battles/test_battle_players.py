"""Players: illegal actions are masked last, draws depend on the decision only, slow players lose no battle."""

import random
import threading
from typing import ClassVar

import numpy as np
import pytest

from pokegemma.errors import CheckFailedError
from tests.battles.simulated import open_seat

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from poke_env.battle import Move, Target
from poke_env.player import MaxBasePowerPlayer as TheirMaxBasePower

from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.players.player import BattleDecision, Decider, mask_illegal
from pokegemma.battles.players.scripted import HeuristicPlayer, MaxBasePowerPlayer, RandomBattlePlayer


@pytest.fixture
def decision(simulator) -> BattleDecision:
    seat = open_seat(simulator)
    return BattleDecision("battle-0", "p1", 3, "0", seat.battle, find_legal_actions(seat.battle))


def test_an_illegal_action_is_never_played() -> None:
    scores = np.arange(13.0)
    assert mask_illegal(scores, (0, 5)) == 5
    assert mask_illegal(np.full(13, -np.inf), (2, 4)) == 2
    scores[6] = np.nan  # of an illegal action
    assert mask_illegal(scores, (0, 5)) == 5


def test_a_legal_action_without_a_score_is_an_error() -> None:
    with pytest.raises(CheckFailedError, match="NaN"):
        mask_illegal(np.full(13, np.nan), (1, 2))


@pytest.mark.parametrize(("shape", "legal"), [((13,), ()), ((9,), (1,))])
def test_scores_of_another_shape_are_refused(shape, legal) -> None:
    with pytest.raises(ValueError, match="13"):
        mask_illegal(np.zeros(shape), legal)


def test_draws_depend_on_battle_role_and_decision(decision: BattleDecision) -> None:
    def draw(**changes) -> list[float]:
        fields = {name: getattr(decision, name) for name in BattleDecision.__dataclass_fields__}
        return RandomBattlePlayer().score([BattleDecision(**{**fields, **changes})])[0].tolist()

    random.seed(1)
    first = draw()
    random.seed(2)  # poke-env's own players draw from here
    assert draw() == first == draw(battle_id="another name of the same battle")
    assert len({tuple(row) for row in (first, draw(seed="1"), draw(role="p2"), draw(number=4))}) == 4


@pytest.mark.parametrize("player", [MaxBasePowerPlayer(), HeuristicPlayer()])
def test_scripted_players_do_not_use_the_global_draws(decision: BattleDecision, player) -> None:
    random.seed(1)
    state = random.getstate()
    player.score([decision])
    assert random.getstate() == state


def test_max_base_power_plays_what_poke_env_plays(decision: BattleDecision) -> None:
    (choice,) = Decider(MaxBasePowerPlayer()).decide([decision])
    order = TheirMaxBasePower.choose_singles_move(decision.battle)
    assert decision.legal[choice.action].subject is order.order
    assert order.order.id == "hyperbeam" and choice.action == 3


def test_the_heuristic_never_sets_up_in_this_version() -> None:
    """poke-env 0.16.1 compares a move's target, an enum since 0.8, with "self"; another version plays otherwise."""
    target = Move("swordsdance", gen=1).target
    assert target is Target.SELF
    assert target != "self"


def test_a_slow_player_has_the_strongest_legal_move_played(decision: BattleDecision) -> None:
    released = threading.Event()

    class SlowPlayer:
        name = "slow"

        def score(self, decisions):
            released.wait()
            return np.zeros((len(decisions), 13))

    decider = Decider(SlowPlayer(), timeout_s=0.05)
    (choice,) = decider.decide([decision])
    assert choice.timed_out
    assert decision.legal[choice.action].subject.id == "hyperbeam"  # 150 x 0.9 x 1.5, against Tauros
    released.set()
    decider.close()


@pytest.mark.parametrize(("timeout_s", "sizes"), [(None, [3]), (100, [1, 1, 1])])
def test_with_a_limit_of_time_each_decision_is_a_call(decision: BattleDecision, timeout_s, sizes) -> None:
    """The time of a batch would tell nothing of its decisions: with three, each would have a third of the limit."""

    class CountingPlayer(MaxBasePowerPlayer):
        calls: ClassVar[list[int]] = []

        def score(self, decisions):
            self.calls.append(len(decisions))
            return super().score(decisions)

    CountingPlayer.calls.clear()
    decider = Decider(CountingPlayer(), timeout_s=timeout_s)
    assert [choice.timed_out for choice in decider.decide([decision] * 3)] == [False] * 3
    assert CountingPlayer.calls == sizes
    decider.close()


def test_a_player_that_names_no_legal_action_is_noticed(decision: BattleDecision) -> None:
    class SilentPlayer:
        name = "silent"

        def score(self, decisions):
            scores = np.full((2, 13), -np.inf)
            scores[0, 12], scores[1, 2] = 0.0, 0.0  # terastallization, which is illegal here; a move
            return scores

    choices = Decider(SilentPlayer()).decide([decision, decision])
    assert [(choice.action, choice.unanswered) for choice in choices] == [(0, True), (2, False)]


def test_a_player_within_the_limit_plays_its_own_action(decision: BattleDecision) -> None:
    decider = Decider(MaxBasePowerPlayer(), timeout_s=100)
    assert decider.decide([decision]) == Decider(MaxBasePowerPlayer()).decide([decision])
    decider.close()


def test_an_error_of_a_player_in_its_thread_is_raised(decision: BattleDecision) -> None:
    class NaNPlayer:
        name = "nan"

        def score(self, decisions):
            raise CheckFailedError("the model returns NaN")

    decider = Decider(NaNPlayer(), timeout_s=100)
    with pytest.raises(CheckFailedError, match="NaN"):
        decider.decide([decision])
    decider.close()
