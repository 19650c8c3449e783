"""The state of a battle that poke-env follows, as metamon records it (`UniversalState.from_Battle`)."""

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from pokegemma.battles.trajectories.names import clean_move, clean_species, clean_word
from pokegemma.battles.trajectories.records import (
    MAX_MOVES,
    NO_MOVE,
    TrajectoryMove,
    TrajectoryPokemon,
    TrajectoryState,
)
from pokegemma.errors import PokegemmaError

try:
    from poke_env.battle import Move, PokemonType, Status
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

if TYPE_CHECKING:
    from poke_env.battle import Battle, Pokemon

_TEAM_SIZE = 6
"""metamon counts the opponents left of six, whatever the size of the team."""


def state_from_battle(battle: "Battle") -> TrajectoryState:
    """Return what a battle's player knows now.

    Call it when both players have an active Pokémon: not in a team preview. `available_switches` also has the Pokémon
    of a trapped player; with Revival Blessing they are those that have fainted.

    Two differences to poke-env 0.16: a Tera type of ours is known before it is used (the request has it, poke-env does
    not read it), and an item that was lost is "noitem" (poke-env: None).
    """
    assert battle.active_pokemon is not None and battle.opponent_active_pokemon is not None, battle.battle_tag
    tera_types = _requested_tera_types(battle)
    bench = [_pokemon(pokemon, tera_type=tera_types.get(ident)) for ident, pokemon in find_bench(battle).items()]
    active_ident = next(ident for ident, pokemon in battle.team.items() if pokemon is battle.active_pokemon)
    fainted = sum(pokemon.status is Status.FNT for pokemon in battle.opponent_team.values())
    preview = [clean_species(pokemon.base_species) for pokemon in battle.teampreview_opponent_team]
    return TrajectoryState(
        format=battle.battle_tag.split("-")[1],
        player_active_pokemon=_pokemon(battle.active_pokemon, tera_type=tera_types.get(active_ident)),
        opponent_active_pokemon=_pokemon(battle.opponent_active_pokemon),
        available_switches=tuple(bench),
        player_prev_move=_previous_move(battle, battle.active_pokemon, role=battle.player_role),
        opponent_prev_move=_previous_move(battle, battle.opponent_active_pokemon, role=battle.opponent_role),
        opponents_remaining=_TEAM_SIZE - fainted,
        player_conditions=_most_recent(battle.side_conditions, none="noconditions"),
        opponent_conditions=_most_recent(battle.opponent_side_conditions, none="noconditions"),
        weather=_most_recent(battle.weather, none="noweather"),
        battle_field=_most_recent(battle.fields, none="nofield"),
        forced_switch=bool(battle.force_switch),
        battle_won=bool(battle.won),
        battle_lost=bool(battle.lost),
        can_tera=bool(battle.can_tera),
        opponent_teampreview=tuple(preview),
    )


def find_bench(battle: "Battle") -> dict[str, "Pokemon"]:
    """Return the Pokémon that a state lists as switches, in the order of the team, by what requests call them."""
    return {
        ident: pokemon
        for ident, pokemon in battle.team.items()
        if not pokemon.active and pokemon.fainted == bool(battle.reviving)
    }


def _requested_tera_types(battle: "Battle") -> dict[str, PokemonType]:
    team = (battle.last_request or {}).get("side", {}).get("pokemon", [])
    return {each["ident"]: PokemonType.from_name(each["teraType"]) for each in team if each.get("teraType")}


def _pokemon(pokemon: "Pokemon", *, tera_type: PokemonType | None = None) -> TrajectoryPokemon:
    types = [_type(each) for each in pokemon.types]
    types += ["notype"] * (2 - len(types))
    effects = pokemon.effects
    return TrajectoryPokemon(
        name=clean_species(pokemon.species),
        hp_pct=float(pokemon.current_hp_fraction),
        types=" ".join(sorted(types)),
        item=_item(pokemon.item),
        ability=_ability(pokemon.ability),
        lvl=pokemon.level,
        status="nostatus" if pokemon.status is None else clean_word(pokemon.status.name),
        effect=clean_word(min(effects, key=effects.get).name) if effects else "noeffect",
        moves=tuple(_move(move) for move in list(pokemon.moves.values())[:MAX_MOVES]),
        tera_type=_type(pokemon.tera_type or tera_type),
        base_species=clean_species(pokemon.base_species),
        **{f"{stat}_boost": boost for stat, boost in pokemon.boosts.items()},
        **{f"base_{stat}": value for stat, value in pokemon.base_stats.items()},
    )


def _type(pokemon_type: PokemonType | None) -> str:
    return "notype" if pokemon_type is None else clean_word(pokemon_type.name)


def _item(item: str | None) -> str:
    if item == "unknown_item":
        return "unknownitem"
    return clean_word(item) if item else "noitem"


def _ability(ability: str | None) -> str:
    if ability is None or ability == "unknown_ability":
        return "unknownability"
    return clean_word(ability) or "noability"


def _move(move: Move) -> TrajectoryMove:
    return TrajectoryMove(
        name=clean_move(move.id),
        move_type=_type(move.type),
        category=clean_word(move.category.name),
        base_power=move.base_power,
        accuracy=move.accuracy,
        priority=move.priority,
        current_pp=move.current_pp,
        max_pp=move.max_pp,
    )


def _previous_move(battle: "Battle", pokemon: "Pokemon", *, role: str) -> TrajectoryMove:
    """Return the last move of a Pokémon since it came in.

    poke-env stores no Struggle, so `last_move` is None after it: then the battle's messages tell. They are private
    (`_replay_data`), and the extra `battles` has poke-env below 0.17 for this reason, too.
    """
    if pokemon.last_move is not None:
        return _move(pokemon.last_move)
    for message in reversed(battle._replay_data):
        if len(message) > 2 and message[1] in ("move", "switch", "drag") and message[2].startswith(role):
            is_struggle = message[1] == "move" and clean_word(message[3]) == "struggle"
            return _move(Move("struggle", gen=battle.gen)) if is_struggle else NO_MOVE
    return NO_MOVE


def _most_recent(started: Mapping[Enum, int], *, none: str) -> str:
    """Return the condition with the highest value: the turn of its start, or its layers for Spikes and Toxic Spikes."""
    return clean_word(max(started, key=started.get).name) if started else none
