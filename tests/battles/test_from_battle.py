"""What poke-env's Battle knows becomes a state; the messages are Pokémon Showdown's protocol."""

import logging
from collections.abc import Iterable
from typing import Any

import pytest
from poke_env.battle import Battle

from pokegemma.battles.trajectories.actions import legal_actions, sort_moves, sort_switches
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.records import NO_MOVE, BattleTrajectory
from pokegemma.battles.trajectories.texts import list_numbers, list_words


def side(*pokemon: dict[str, Any]) -> dict[str, Any]:
    return {"name": "Me", "id": "p1", "pokemon": list(pokemon)}


def own(name: str, details: str, moves: Iterable[str], **changes: Any) -> dict[str, Any]:
    stats = dict.fromkeys(("atk", "def", "spa", "spd", "spe"), 200)
    return {
        "ident": f"p1: {name}",
        "details": details,
        "condition": "300/300",
        "active": False,
        "stats": stats,
        "moves": list(moves),
        "baseAbility": "noability",
        "item": "",
        "pokeball": "pokeball",
        **changes,
    }


def play(battle: Battle, *lines: str) -> None:
    for line in lines:
        battle.parse_message(line.split("|"))


@pytest.fixture
def gen1_battle():
    battle = Battle("battle-gen1ou-7", "Me", logging.getLogger("test"), gen=1)
    battle.player_role = "p1"
    moves = [{"move": name, "id": name, "pp": 10, "maxpp": 10, "disabled": False} for name in ("surf", "blizzard")]
    request = {
        "active": [{"moves": moves}],
        "side": side(
            own("Starmie", "Starmie", ("surf", "blizzard", "thunderwave", "recover"), active=True),
            own("Tauros", "Tauros", ("bodyslam", "earthquake", "blizzard", "hyperbeam"), condition="150/300 par"),
            own("Chansey", "Chansey", ("softboiled", "icebeam", "thunderbolt", "sing"), condition="0 fnt"),
            own("Alakazam", "Alakazam", ("psychic", "recover", "thunderwave", "reflect")),
        ),
    }
    battle.parse_request(request)
    play(battle, "|switch|p1a: Starmie|Starmie|300/300", "|switch|p2a: Rhydon|Rhydon, L88|100/100", "|turn|1")
    return battle


def test_a_battle_of_generation_1(gen1_battle):
    play(
        gen1_battle,
        "|move|p1a: Starmie|Surf|p2a: Rhydon",
        "|-damage|p2a: Rhydon|20/100",
        "|move|p2a: Rhydon|Body Slam|p1a: Starmie",
        "|-damage|p1a: Starmie|150/300",
        "|-boost|p2a: Rhydon|atk|2",
        "|turn|2",
    )
    state = state_from_battle(gen1_battle)
    mine, foe = state.player_active_pokemon, state.opponent_active_pokemon
    assert (state.format, state.opponents_remaining, state.forced_switch, state.can_tera) == ("gen1ou", 6, False, False)
    assert (mine.name, mine.hp_pct, mine.types, mine.item, mine.ability) == (
        "starmie",
        0.5,
        "psychic water",
        "noitem",
        "noability",
    )
    assert (foe.name, foe.hp_pct, foe.types, foe.item, foe.ability, foe.lvl, foe.atk_boost) == (
        "rhydon",
        0.2,
        "ground rock",
        "unknownitem",
        "unknownability",
        88,
        2,
    )
    assert [move.name for move in foe.moves] == ["bodyslam"]
    assert (state.player_prev_move.name, state.player_prev_move.current_pp) == ("surf", 23)
    assert [move.name for move in sort_moves(mine)] == ["blizzard", "recover", "surf", "thunderwave"]
    assert [(each.name, each.hp_pct, each.status) for each in sort_switches(state)] == [
        ("alakazam", 1.0, "nostatus"),
        ("tauros", 0.5, "par"),
    ]
    assert legal_actions(state) == (0, 1, 2, 3, 4, 5)
    assert (len(list_words(state)), list_numbers(state).shape) == (87, (48,))


def test_a_state_of_a_battle_is_written_and_read(gen1_battle):
    trajectory = BattleTrajectory((state_from_battle(gen1_battle),), (-1,))
    assert BattleTrajectory.from_json(trajectory.to_json()) == trajectory


def test_the_previous_move_is_that_since_the_pokemon_came_in(gen1_battle):
    assert state_from_battle(gen1_battle).player_prev_move is NO_MOVE
    play(gen1_battle, "|move|p2a: Rhydon|Struggle|p1a: Starmie")
    state = state_from_battle(gen1_battle)
    assert (state.opponent_prev_move.name, state.opponent_prev_move.base_power) == ("struggle", 50)
    play(gen1_battle, "|switch|p2a: Gengar|Gengar|100/100")
    assert state_from_battle(gen1_battle).opponent_prev_move is NO_MOVE


def test_the_end_of_a_battle(gen1_battle):
    play(gen1_battle, "|faint|p2a: Rhydon")
    gen1_battle.won_by("Me")
    state = state_from_battle(gen1_battle)
    assert (state.battle_won, state.battle_lost, state.opponents_remaining) == (True, False, 5)


def test_a_tie_is_neither_won_nor_lost(gen1_battle):
    gen1_battle.tied()
    state = state_from_battle(gen1_battle)
    assert (state.battle_won, state.battle_lost) == (False, False)


def test_a_battle_of_generation_9():
    battle = Battle("battle-gen9randombattle-7", "Me", logging.getLogger("test"), gen=9)
    battle.player_role = "p1"
    moves = [{"move": name, "id": name, "pp": 10, "maxpp": 10, "target": "normal"} for name in ("uturn", "hurricane")]
    volcarona = own(
        "Volcarona",
        "Volcarona, L77, M",
        ("uturn", "hurricane"),
        active=True,
        baseAbility="flamebody",
        ability="flamebody",
        item="heavydutyboots",
        teraType="Water",
        terastallized="",
    )
    porygon = own(
        "Porygon2",
        "Porygon2, L80",
        ("triattack", "recover"),
        baseAbility="download",
        ability="download",
        item="eviolite",
        teraType="Ghost",
        terastallized="",
    )
    battle.parse_request({"active": [{"moves": moves, "canTerastallize": "Water"}], "side": side(volcarona, porygon)})
    play(
        battle,
        "|switch|p1a: Volcarona|Volcarona, L77, M|300/300",
        "|switch|p2a: Skeledirge|Skeledirge, L78, F|100/100",
        "|turn|1",
        "|-sidestart|p1: Me|move: Stealth Rock",
        "|-weather|SunnyDay|[from] ability: Drought|[of] p2a: Skeledirge",
        "|-enditem|p2a: Skeledirge|Leftovers|[from] move: Knock Off|[of] p1a: Volcarona",
        "|-start|p2a: Skeledirge|move: Taunt",
        "|turn|2",
    )
    state = state_from_battle(battle)
    assert (state.can_tera, state.player_active_pokemon.tera_type) == (True, "water")
    assert (state.available_switches[0].name, state.available_switches[0].tera_type) == ("porygon2", "ghost")
    assert (state.player_conditions, state.opponent_conditions, state.weather) == (
        "stealthrock",
        "noconditions",
        "sunnyday",
    )
    assert (state.opponent_active_pokemon.item, state.opponent_active_pokemon.effect) == ("noitem", "taunt")
    assert legal_actions(state) == (0, 1, 4, 9, 10)
    play(battle, "|-terastallize|p1a: Volcarona|Water", "|detailschange|p1a: Volcarona|Volcarona, L77, M, tera:Water")
    assert state_from_battle(battle).player_active_pokemon.types == "notype water"
