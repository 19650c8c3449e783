"""Teams for formats in which the players bring them."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from pokegemma.battles.simulated_battle import BattleFormat
from pokegemma.battles.simulator import Simulator
from pokegemma.errors import PokegemmaError

_SAMPLES = Path(__file__).parent / "sample_teams"
_HEADING = re.compile(r"^===.*===$", re.MULTILINE)


def read_teams(simulator: Simulator, battle_format: BattleFormat, path: Path | None = None) -> list[str]:
    """Return the packed teams of a file, as the validator returned them; an empty list for a format with random teams.

    Args:
        path: teams as Showdown's team builder exports them, each below a line "=== name ==="; None: those that
            pokegemma has for the format.

    Raises:
        PokegemmaError: there is no such file, it contains no team, or the format does not allow one of them.
    """
    if battle_format.has_random_teams:
        if path is not None:
            raise PokegemmaError(f"{path}: format {battle_format.name!r} draws its teams; leave out the file of teams")
        return []
    source = path or _SAMPLES / f"{battle_format.name}.txt"
    if not source.is_file():
        known = ", ".join(sorted(each.stem for each in _SAMPLES.glob("*.txt")))
        hint = f"name a file with --teams_file (pokegemma has teams for {known})" if path is None else "no such file"
        raise PokegemmaError(f"teams of format {battle_format.name!r}: {hint}")
    try:
        content = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PokegemmaError(f"{source}: cannot be read as text in UTF-8: {error}") from error
    texts = [text.strip() for text in _HEADING.split(content)]
    teams = [simulator.validate_team(battle_format.name, text) for text in texts if text]
    if not teams:
        raise PokegemmaError(f"{source}: contains no team")
    return teams


def draw_teams(teams: Sequence[str], *, seed: str) -> tuple[str | None, str | None]:
    """Return a team for p1 and one for p2, drawn by the battle's seed; None for both where there are no teams."""
    if not teams:
        return None, None
    draws = random.Random(f"{seed}/teams")
    return draws.choice(teams), draws.choice(teams)
