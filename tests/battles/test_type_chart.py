"""The type chart is Pokémon Showdown's, in every generation."""

import pytest
from poke_env.battle import PokemonType
from poke_env.data import GenData

from pokegemma.battles.trajectories.type_chart import effectiveness


@pytest.mark.parametrize("generation", range(1, 10))
def test_the_chart_is_that_of_showdown(generation):
    chart = GenData.load_type_chart(GenData.__new__(GenData), generation)
    later = {"DARK", "STEEL", "FAIRY"} if generation == 1 else {"FAIRY"} if generation < 6 else set()
    types = set(chart) & set(PokemonType.__members__) - later - {"STELLAR"}
    assert len(types) == 18 - len(later)
    different = [
        (attacker, defender)
        for defender in types
        for attacker in types
        if effectiveness(attacker.lower(), defender.lower(), generation=generation) != chart[defender][attacker]
    ]
    assert different == []


def test_two_types_multiply_and_no_type_counts_once():
    assert effectiveness("water", "ground rock", generation=1) == 4.0
    assert effectiveness("grass", "fire notype", generation=9) == 0.5
    assert effectiveness("normal", "ghost notype", generation=9) == 0.0
    assert effectiveness("nomove", "ghost notype", generation=9) == 1.0
