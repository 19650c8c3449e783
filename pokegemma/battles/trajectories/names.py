"""Names as metamon writes them: species in lower-case letters and digits, all else in lower-case letters only."""

import functools
import re

from pokegemma.battles.trajectories.records import TrajectoryError

_GENERATION = re.compile(r"gen([1-9])[a-z0-9]+")


@functools.lru_cache(8192)
def clean_species(name: str) -> str:
    """Return "rotomwash" for "Rotom-Wash" and "porygon2" for "Porygon2"."""
    return "".join(filter(str.isalnum, name)).lower()


@functools.lru_cache(8192)
def clean_word(name: str) -> str:
    """Return "stealthrock" for "STEALTH_ROCK"; digits are left out."""
    return "".join(filter(str.isalpha, name)).lower()


@functools.lru_cache(8192)
def clean_move(name: str) -> str:
    """Return a move's name: all kinds of Hidden Power have one, and so have Return and Frustration."""
    word = clean_word(name)
    for start in ("hiddenpower", "return", "frustration"):
        if word.startswith(start):
            return start
    return "visegrip" if word == "vicegrip" else word


def generation_of(battle_format: str) -> int:
    """Return 1 to 9 for a format such as "gen1ou".

    Raises:
        TrajectoryError: the format does not begin so.
    """
    if not (match := _GENERATION.fullmatch(battle_format)):
        raise TrajectoryError(f"format {battle_format!r}: must be gen1 to gen9 and a name, such as gen1ou")
    return int(match[1])
