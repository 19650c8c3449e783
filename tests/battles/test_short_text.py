"""The short text: its words, one by one, and that no fact of the 87 words is lost."""

import json

import pytest

from pokegemma.battles.trajectories.records import BattleTrajectory, TrajectoryError
from pokegemma.battles.trajectories.short_text import action_word, write_short_text
from tests.battles.states import make_move, make_pokemon, make_state

MINE = make_pokemon(
    "starmie",
    hp_pct=0.41,
    types="psychic water",
    status="par",
    base_spe=115,
    moves=(
        make_move("surf", move_type="water", category="special", base_power=95),
        make_move("blizzard", move_type="ice", category="special", base_power=120, accuracy=0.9),
        make_move("recover", category="status", base_power=0),
        make_move("quickattack", priority=1),
    ),
)
FOE = make_pokemon("rhydon", hp_pct=0.02, types="ground rock", lvl=88, atk_boost=2, moves=())
BENCH = make_pokemon(
    "tauros", types="normal notype", item="leftovers", moves=(make_move("earthquake", move_type="ground"), make_move())
)


def test_every_word_of_a_state():
    state = make_state(
        player_active_pokemon=MINE,
        opponent_active_pokemon=FOE,
        available_switches=(BENCH,),
        opponents_remaining=4,
        opponent_conditions="reflect",
        opponent_prev_move=make_move("bodyslam"),
    )
    assert write_short_text(state) == (
        "gen1ou foes4 me starmie hp5 par slower "
        "<0> blizzard ice special120 x2 acc90 <1> quickattack normal physical40 x1/2 first+1 "
        "<2> recover normal status <3> surf water special100 x4 stab "
        "<4> tauros hp10 leftovers hits-x2 takes-x1 moves earthquake tackle "
        "foe rhydon hp1 L88 ground rock atk+2 theirs reflect foelast bodyslam"
    )


def test_a_forced_switch_has_no_moves_and_no_tera():
    state = make_state(player_active_pokemon=MINE, forced_switch=True, can_tera=True)
    text = write_short_text(state)
    assert "forced" in text.split() and "tera" not in text.split() and action_word(0) not in text.split()


def test_a_tera_type_is_written_where_it_can_be_used():
    mine = make_pokemon(tera_type="ghost")
    text = write_short_text(make_state(format="gen9ou", player_active_pokemon=mine, can_tera=True))
    assert " tera ghost <0> " in text


@pytest.mark.parametrize(
    ("changes", "speed"),
    [
        ({}, "samespeed"),
        ({"base_spe": 61}, "faster"),
        ({"spe_boost": -1}, "slower"),
        ({"status": "par"}, "slower"),
        ({"item": "choicescarf"}, "faster"),
    ],
)
def test_who_is_faster(changes, speed):
    state = make_state(player_active_pokemon=make_pokemon(**changes), opponent_active_pokemon=make_pokemon())
    assert speed in write_short_text(state).split()


def test_trick_room_turns_the_order_round():
    state = make_state(player_active_pokemon=make_pokemon(base_spe=90), battle_field="trickroom")
    assert "slower" in write_short_text(state).split()


def test_a_format_without_a_generation_is_refused():
    with pytest.raises(TrajectoryError, match="'ou'"):
        write_short_text(make_state(format="ou"))


def test_states_that_differ_have_different_texts(golden):
    """The oracle's states have as many short texts as texts of 87 words."""
    data = {"states": [row["state"] for row in golden], "actions": [-1]}
    states = BattleTrajectory.from_json(json.dumps(data).encode()).states
    texts = {row["DefaultObservationSpace"]["text"] for row in golden}
    assert len({write_short_text(state) for state in states}) >= len(texts)
