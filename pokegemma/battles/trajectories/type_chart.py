"""How effective a type of move is against a Pokémon's types, in each generation."""

import functools

# One row for each type of the move, one character for each type of the defender in the order of the rows:
# "." 1, "+" 2, "-" 1/2, "0" 0. As in generations 6 to 9; the differences of earlier ones are below.
_CHART = {
    "normal": "............-0..-.",
    "fire": ".--.++.....+-.-.+.",
    "water": ".+-.-...+...+.-...",
    "electric": "..+--...0+....-...",
    "grass": ".-+.-..-+-.-+.-.-.",
    "ice": ".--.+-..++....+.-.",
    "fighting": "+....+.-.---+0.++-",
    "poison": "....+..--...--..0+",
    "ground": ".+.+-..+.0.-+...+.",
    "flying": "...-+.+....+-...-.",
    "psychic": "......++..-....0-.",
    "bug": ".-..+.--.-+..-.+--",
    "rock": ".+...+-.-+.+....-.",
    "ghost": "0.........+..+.-..",
    "dragon": "..............+.-0",
    "dark": "......-...+..+.-.-",
    "steel": ".---.+......+...-+",
    "fairy": ".-....+-......++-.",
}
_PLACES = {name: place for place, name in enumerate(_CHART)}
_VALUES = {".": 1.0, "+": 2.0, "-": 0.5, "0": 0.0}
_UNTIL_GENERATION_5 = {("ghost", "steel"): 0.5, ("dark", "steel"): 0.5}
_IN_GENERATION_1 = {("bug", "poison"): 2.0, ("poison", "bug"): 2.0, ("ghost", "psychic"): 0.0, ("ice", "fire"): 1.0}


@functools.lru_cache(4096)
def effectiveness(move_type: str, types: str, *, generation: int) -> float:
    """Return 0, 1/4, 1/2, 1, 2 or 4: the factor of a type of move against `types`, words with a space between them.

    Words that are no type in the chart ("notype", "stellar") count 1. Abilities and items are not considered.
    """
    factor = 1.0
    for defender in types.split(" "):
        if move_type not in _CHART or defender not in _CHART:
            continue
        value = _VALUES[_CHART[move_type][_PLACES[defender]]]
        if generation <= 5:
            value = _UNTIL_GENERATION_5.get((move_type, defender), value)
        if generation == 1:
            value = _IN_GENERATION_1.get((move_type, defender), value)
        factor *= value
    return factor
