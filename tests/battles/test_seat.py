"""What a player's view of a battle follows, and which actions are legal in it."""

import pytest

from tests.battles.simulated import change_request, open_seat

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.legal_actions import find_legal_actions


def choices(seat) -> dict[int, str]:
    return {number: action.choice for number, action in find_legal_actions(seat.battle).items()}


def moves(*names: str, **facts) -> list[dict]:
    return [{"move": name.title(), "id": name, **facts} for name in names]


def test_actions_are_the_moves_and_then_the_switches_sorted_by_name(simulator) -> None:
    seat = open_seat(simulator)
    assert [move["id"] for move in seat.battle.last_request["active"][0]["moves"]] == [
        "bodyslam",
        "earthquake",
        "hyperbeam",
        "blizzard",
    ]
    # blizzard, bodyslam, earthquake, hyperbeam; poke-env would number the switch 0 and the moves 6 to 9
    assert choices(seat) == {0: "move 4", 1: "move 1", 2: "move 2", 3: "move 3", 4: "switch 2"}


def test_a_disabled_move_is_not_legal_and_the_others_keep_their_numbers(simulator) -> None:
    seat = open_seat(simulator)
    request = seat.battle.last_request["active"][0]["moves"]
    change_request(seat, moves=[{**move, "disabled": move["id"] == "bodyslam"} for move in request])
    assert choices(seat) == {0: "move 4", 2: "move 2", 3: "move 3", 4: "switch 2"}


@pytest.mark.parametrize("name", ["fight", "struggle", "recharge"])
def test_a_single_move_that_is_not_in_the_moveset_is_0(simulator, name: str) -> None:
    """Generation 1 sends "fight" where the Pokémon cannot choose its move."""
    seat = open_seat(simulator)
    change_request(seat, moves=moves(name), trapped=True)
    assert choices(seat) == {0: "move 1"}


def test_a_trapped_pokemon_cannot_be_switched(simulator) -> None:
    seat = open_seat(simulator)
    change_request(seat, trapped=True)
    assert choices(seat) == {0: "move 4", 1: "move 1", 2: "move 2", 3: "move 3"}


def test_a_locked_move_keeps_its_number(simulator) -> None:
    seat = open_seat(simulator)
    change_request(seat, moves=moves("hyperbeam"), trapped=True)
    assert choices(seat) == {3: "move 1"}


def test_moves_with_terastallization_follow_the_switches(simulator) -> None:
    seat = open_seat(simulator, battle_format="gen9randombattle", team=None)
    assert seat.battle.can_tera is True  # a type in earlier versions of poke-env
    legal = choices(seat)
    assert list(legal) == list(range(13))
    assert [legal[9 + number] for number in range(4)] == [f"{legal[number]} terastallize" for number in range(4)]


def test_a_choice_that_did_not_happen_is_told_from_an_illegal_one(simulator) -> None:
    seat = open_seat(simulator)
    seat.answered()
    seat.read("|error|[Unavailable choice] Can't switch: The active Pokémon is trapped")
    assert (seat.was_unavailable, seat.problem, seat.has_request) == (True, "", False)
    change_request(seat, trapped=True)
    assert seat.has_request and 4 not in choices(seat)
    seat.read("|error|[Invalid choice] Can't move: Tauros doesn't have a move 7")
    assert "[Invalid choice]" in seat.problem


def test_the_warning_of_a_long_battle_is_no_problem(simulator) -> None:
    """poke-env's Battle raises NotImplementedError at it; its Player keeps it away from there."""
    seat = open_seat(simulator)
    seat.read("|bigerror|You will auto-tie if the battle doesn't end in 500 turns (on turn 1000).")
    assert seat.problem == ""


def test_a_message_that_poke_env_does_not_know_ends_the_battle(simulator) -> None:
    seat = open_seat(simulator)
    seat.read("|newmessage|p1a: Tauros")
    assert "newmessage" in seat.problem


def test_the_tier_is_not_taken_for_a_tie(simulator) -> None:
    seat = open_seat(simulator)
    assert not seat.battle.finished
    seat.read("|tier|[Gen 1] OU\n|-message|win|ann")
    assert not seat.battle.finished
    seat.read("|\n|tie")
    assert seat.battle.finished and seat.battle.won is None


def test_a_win_is_of_the_player_it_names(simulator) -> None:
    seat, other = open_seat(simulator), open_seat(simulator, role="p2")
    for each in (seat, other):
        each.read("|\n|win|ann")
    assert (seat.battle.won, other.battle.won) == (True, False)


def test_a_request_to_wait_needs_no_choice(simulator) -> None:
    seat = open_seat(simulator)
    side = '"side":{"name":"ann","id":"p1","pokemon":[]}'
    seat.read('|request|{"wait":true,' + side + "}")
    assert not seat.has_request
