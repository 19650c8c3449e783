"""A state as a short text for a language model: no word that says nothing, and each option behind its action.

    gen1ou foes4 me starmie hp5 par slower <0> blizzard ice special120 x1 acc90 <1> recover status ... <4> tauros hp10
    hits-x2 takes-x1/2 moves blizzard bodyslam earthquake hyperbeam foe rhydon hp2 L88 atk+2 last surf foelast bodyslam

The facts are those of the 87 words and 48 numbers. Numbers are buckets (hp10 is full, hp1 is above 0). Sentinels such
as "noitem", full accuracy, level 100, boosts and priorities of 0 are left out. What the 87 words leave to be learned
is written out: a move's effectiveness (x0 to x4) against the opponent's types, "stab", who is faster, how well a
Pokémon on the bench hits and is hit. A terastallization is the word "tera" and its type, for actions 9-12.
"""

import math

from pokegemma.battles.trajectories.actions import FIRST_SWITCH, sort_moves, sort_switches
from pokegemma.battles.trajectories.names import clean_move, clean_word, generation_of
from pokegemma.battles.trajectories.records import NO_MOVE, TrajectoryMove, TrajectoryPokemon, TrajectoryState
from pokegemma.battles.trajectories.type_chart import effectiveness

_SENTINELS = {"noitem", "unknownitem", "noability", "unknownability", "nostatus", "noeffect"}
_BOOSTS = ("atk", "spa", "def", "spd", "spe", "accuracy", "evasion")
_FACTORS = {0.0: "x0", 0.25: "x1/4", 0.5: "x1/2", 1.0: "x1", 2.0: "x2", 4.0: "x4"}
_POWER_STEP, _HP_BUCKETS = 20, 10


def action_word(action: int) -> str:
    """Return the word for an action, "<0>" to "<12>", in texts and as the answer to them."""
    return f"<{action}>"


def list_short_words(state: TrajectoryState) -> list[str]:
    """Return the words of a state's short text.

    Raises:
        TrajectoryError: the format does not name its generation.
    """
    generation = generation_of(state.format)
    mine, foe = state.player_active_pokemon, state.opponent_active_pokemon
    words = [state.format, f"foes{state.opponents_remaining}"]
    words += ["forced"] if state.forced_switch else []
    words += ["me", *_pokemon_words(mine), *_boost_words(mine), _compare_speed(state, generation)]
    if not state.forced_switch:
        words += ["tera", mine.tera_type] if state.can_tera else []
        for action, move in enumerate(sort_moves(mine)):
            words += [action_word(action), *_move_words(move, mine, foe, generation)]
    for action, pokemon in enumerate(sort_switches(state), FIRST_SWITCH):
        words += [action_word(action), *_pokemon_words(pokemon), *_matchup_words(pokemon, foe, generation)]
        words += ["moves", *(clean_move(move.name) for move in sort_moves(pokemon))]
    words += ["foe", *_pokemon_words(foe), *_type_words(foe), *_boost_words(foe)]
    return [*words, *_field_words(state)]


def write_short_text(state: TrajectoryState) -> str:
    """Return a state's short text, words with a space between them."""
    return " ".join(list_short_words(state))


def _pokemon_words(pokemon: TrajectoryPokemon) -> list[str]:
    words = [pokemon.name, f"hp{math.ceil(pokemon.hp_pct * _HP_BUCKETS)}"]
    words += [f"L{pokemon.lvl}"] if pokemon.lvl != 100 else []
    facts = (pokemon.status, pokemon.effect, pokemon.item, pokemon.ability)
    return words + [fact for fact in facts if fact not in _SENTINELS]


def _boost_words(pokemon: TrajectoryPokemon) -> list[str]:
    boosts = [(stat, getattr(pokemon, f"{stat}_boost")) for stat in _BOOSTS]
    return [f"{stat}{boost:+d}" for stat, boost in boosts if boost]


def _type_words(pokemon: TrajectoryPokemon) -> list[str]:
    return [word for word in pokemon.types.split(" ") if word != "notype"]


def _move_words(move: TrajectoryMove, mine: TrajectoryPokemon, foe: TrajectoryPokemon, generation: int) -> list[str]:
    words, category = [clean_move(move.name), clean_word(move.move_type)], clean_word(move.category)
    if category == "status":
        words.append(category)
    else:
        words.append(f"{category}{math.ceil(move.base_power / _POWER_STEP) * _POWER_STEP}")
        words.append(_FACTORS[effectiveness(words[1], foe.types, generation=generation)])
        words += ["stab"] if words[1] in mine.types.split(" ") else []
    words += [f"acc{round(move.accuracy * 20) * 5}"] if move.accuracy < 1 else []
    return words + ([f"first{move.priority:+d}"] if move.priority else [])


def _matchup_words(pokemon: TrajectoryPokemon, foe: TrajectoryPokemon, generation: int) -> list[str]:
    """Return the best factor of a Pokémon's attacks on the opponent, and of the opponent's own types on it."""
    attacks = [clean_word(move.move_type) for move in sort_moves(pokemon) if clean_word(move.category) != "status"]
    words = []
    for label, types, target in (("hits", attacks, foe), ("takes", _type_words(foe), pokemon)):
        factors = [effectiveness(each, target.types, generation=generation) for each in types]
        words += [f"{label}-{_FACTORS[max(factors)]}"] if factors else []
    return words


def _compare_speed(state: TrajectoryState, generation: int) -> str:
    mine, foe = state.player_active_pokemon, state.opponent_active_pokemon
    difference = _estimate_speed(mine, generation) - _estimate_speed(foe, generation)
    if state.battle_field == "trickroom":
        difference = -difference
    return "faster" if difference > 0 else "slower" if difference < 0 else "samespeed"


def _estimate_speed(pokemon: TrajectoryPokemon, generation: int) -> float:
    """Return the speed of a Pokémon trained as both sides usually are: base, level, boost, paralysis and Choice Scarf.

    The formula is the games' (https://bulbapedia.bulbagarden.net/wiki/Stat), with what all training adds as 94.
    """
    speed = (2 * pokemon.base_spe + 94) * pokemon.lvl / 100 + 5
    boost = pokemon.spe_boost
    speed *= (2 + boost) / 2 if boost >= 0 else 2 / (2 - boost)
    speed *= (0.5 if generation >= 7 else 0.25) if pokemon.status == "par" else 1
    return speed * (1.5 if pokemon.item == "choicescarf" else 1)


def _field_words(state: TrajectoryState) -> list[str]:
    words = []
    for label, fact, sentinel in (
        ("weather", state.weather, "noweather"),
        ("field", state.battle_field, "nofield"),
        ("mine", state.player_conditions, "noconditions"),
        ("theirs", state.opponent_conditions, "noconditions"),
        ("last", clean_move(state.player_prev_move.name), NO_MOVE.name),
        ("foelast", clean_move(state.opponent_prev_move.name), NO_MOVE.name),
    ):
        words += [label, fact] if fact != sentinel else []
    return words
