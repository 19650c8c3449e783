"""The results of an arena, a line of JSON for each battle, appended as it ends."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.battles.arena.plan import ArenaBattle
from pokegemma.errors import PokegemmaError, one_line

logger = logging.getLogger(__name__)

BATTLES_FILE = "results.jsonl"


@dataclass(frozen=True)
class ArenaResult:
    """A battle that was played.

    Attributes:
        winner: a player's name; None for a tie.
        turn_limit_reached: the limit of turns ended it, which counts as a tie.
        num_timeouts, num_unanswered: decisions of the pair's first and second player that were not its own; see
            `Choice`.
    """

    pair: tuple[str, str]
    round: int
    swapped: bool
    winner: str | None
    num_turns: int
    turn_limit_reached: bool
    num_timeouts: tuple[int, int]
    num_unanswered: tuple[int, int] = (0, 0)

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


def mend_results(path: Path) -> None:
    """Remove half a line at the end of a file that no process appends to now, and report battles that are there twice.

    A full disk or a crash of the machine leaves half a line; its battle is played again.

    Raises:
        PokegemmaError: as `read_battles`.
    """
    content = path.read_bytes() if path.is_file() else b""
    num_whole = content.rfind(b"\n") + 1
    if num_whole < len(content):
        logger.warning("%s: half a line at its end is removed; that battle is played again", path)
        os.truncate(path, num_whole)
    if num_repeated := content.count(b"\n") - len(read_battles(path)):
        logger.warning("%s: %d lines repeat battles; the first line of each battle counts", path, num_repeated)


def read_battles(path: Path) -> dict[ArenaBattle, ArenaResult]:
    """Return the results in the whole lines of a file, none where it does not exist.

    Of a battle that is there twice the first line counts.

    Raises:
        PokegemmaError: a line is not a result.
    """
    content = path.read_bytes() if path.is_file() else b""
    results: dict[ArenaBattle, ArenaResult] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            result = _from_json(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PokegemmaError(f"{path}:{number}: not the result of a battle ({one_line(error)})") from error
        results.setdefault(result.battle, result)
    return results


def _from_json(data: Mapping[str, Any]) -> ArenaResult:
    return ArenaResult(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
