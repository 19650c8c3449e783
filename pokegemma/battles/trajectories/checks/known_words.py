"""The words that a field of a state may have: Pokémon Showdown's names, as far as poke-env lists them."""

import functools
import re
from collections import Counter
from dataclasses import dataclass

from pokegemma.battles.trajectories.names import clean_move, clean_species, clean_word
from pokegemma.battles.trajectories.records import TrajectoryMove, TrajectoryPokemon, TrajectoryState
from pokegemma.errors import PokegemmaError

try:
    from poke_env.battle import Effect, Field, MoveCategory, PokemonType, SideCondition, Status, Weather
    from poke_env.data import GenData
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

_LAST_GENERATION = 9
"""Its lists have what earlier generations had, too."""

_ITEM = re.compile(r"[a-z]{2,40}")


@dataclass(frozen=True)
class KnownWords:
    """The words of each kind of field. poke-env lists no items: any word of 2 to 40 letters may be one."""

    species: frozenset[str]
    moves: frozenset[str]
    abilities: frozenset[str]
    types: frozenset[str]
    categories: frozenset[str]
    statuses: frozenset[str]
    effects: frozenset[str]
    conditions: frozenset[str]
    weather: frozenset[str]
    fields: frozenset[str]

    def count_unknown(self, state: TrajectoryState) -> tuple[Counter[str], int]:
        """Return the unknown words of a state, and the number of all."""
        words = [(word, self.conditions) for word in (state.player_conditions, state.opponent_conditions)]
        words += [(state.weather, self.weather), (state.battle_field, self.fields)]
        words += [(name, self.species) for name in state.opponent_teampreview]
        for pokemon in (state.player_active_pokemon, state.opponent_active_pokemon, *state.available_switches):
            words += self._words_of(pokemon)
            words += [word for move in pokemon.moves for word in self._words_of_move(move)]
        for move in (state.player_prev_move, state.opponent_prev_move):
            words += self._words_of_move(move)
        return Counter(word for word, known in words if not _is_in(word, known)), len(words)

    def _words_of(self, pokemon: TrajectoryPokemon) -> list[tuple[str, frozenset[str] | None]]:
        words = [(pokemon.name, self.species), (pokemon.base_species, self.species), (pokemon.item, None)]
        words += [(pokemon.ability, self.abilities), (pokemon.status, self.statuses), (pokemon.effect, self.effects)]
        return words + [(word, self.types) for word in (*pokemon.types.split(" "), pokemon.tera_type)]

    def _words_of_move(self, move: TrajectoryMove) -> list[tuple[str, frozenset[str]]]:
        return [(move.name, self.moves), (move.move_type, self.types), (move.category, self.categories)]


def _is_in(word: str, known: frozenset[str] | None) -> bool:
    return word in known if known is not None else bool(_ITEM.fullmatch(word))


@functools.cache
def load_known_words() -> KnownWords:
    """Return the words of all generations; the first call takes a second."""
    data = GenData.from_gen(_LAST_GENERATION)
    names = lambda members, *more: frozenset({*map(clean_word, members.__members__), *more})  # noqa: E731
    abilities = {clean_word(each) for entry in data.pokedex.values() for each in entry["abilities"].values()}
    return KnownWords(
        species=frozenset(map(clean_species, data.pokedex)),
        moves=frozenset(map(clean_move, data.moves)) | {"nomove", "struggle", "recharge"},
        abilities=frozenset(abilities) | {"noability", "unknownability"},
        types=names(PokemonType, "notype", "nomove"),
        categories=names(MoveCategory, "nomove"),
        statuses=names(Status, "nostatus"),
        effects=names(Effect, "noeffect"),
        conditions=names(SideCondition, "noconditions"),
        weather=names(Weather, "noweather"),
        fields=names(Field, "nofield"),
    )
