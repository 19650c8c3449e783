"""The results of an arena, a line of JSON for each battle, appended as it ends."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.battles.arena.plan import ArenaBattle
from pokegemma.errors import PokegemmaError

BATTLES_FILE = "results.jsonl"


@dataclass(frozen=True)
class ArenaResult:
    """A battle that was played.

    Attributes:
        winner: a player's name; None for a tie.
        turn_limit_reached: the limit of turns ended it, which counts as a tie.
        num_timeouts: of the pair's first and second player.
    """

    pair: tuple[str, str]
    round: int
    swapped: bool
    winner: str | None
    num_turns: int
    turn_limit_reached: bool
    num_timeouts: tuple[int, int]

    @property
    def battle(self) -> ArenaBattle:
        return ArenaBattle(self.pair, self.round, self.swapped)


def append_result(path: Path, result: ArenaResult) -> None:
    """Add a line to a file that several processes append to: one system call, which a signal does not divide."""
    line = json.dumps(asdict(result)).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: not all of a line could be written; the disk is full?")
    finally:
        os.close(descriptor)


def read_battles(path: Path) -> dict[ArenaBattle, ArenaResult]:
    """Return the results of a file that no process appends to now, none where it does not exist.

    Half a line at its end, which a full disk or a crash of the machine left, is cut off: that battle is played again.

    Raises:
        PokegemmaError: a line is not a result, or a battle is in it twice.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content.rpartition(b"\n")[0]
    if len(whole) + 1 < len(content):
        os.truncate(path, len(whole) + 1 if whole else 0)
    results: dict[ArenaBattle, ArenaResult] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            result = _from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise PokegemmaError(f"{path}:{number}: not the result of a battle ({error})") from error
        if result.battle in results:
            raise PokegemmaError(f"{path}:{number}: battle {result.battle.battle_id} is in it twice")
        results[result.battle] = result
    return results


def _from_json(data: Mapping) -> ArenaResult:
    return ArenaResult(**{**data, "pair": tuple(data["pair"]), "num_timeouts": tuple(data["num_timeouts"])})
