"""A battle's log in Pokémon Showdown's protocol as turns in plain words, for a page that needs no network.

The protocol is https://github.com/smogon/pokemon-showdown/blob/master/sim/SIM-PROTOCOL.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

_ROLES = ("p1", "p2")
_STATUS = {
    "par": "is paralyzed",
    "slp": "falls asleep",
    "brn": "is burned",
    "frz": "is frozen",
    "psn": "is poisoned",
    "tox": "is badly poisoned",
}


@dataclass(frozen=True)
class ActivePokemon:
    """The Pokémon that a side has on the field. `hp_percent` is 0 to 100; `status` as the protocol has it, or ""."""

    name: str
    hp_percent: float
    status: str


@dataclass(frozen=True)
class BattleTurn:
    """What happened in a turn, number 0 before the first, and both sides' active Pokémon after it."""

    number: int
    events: tuple[str, ...]
    actives: tuple[ActivePokemon | None, ActivePokemon | None]


@dataclass
class _Reader:
    """Where the reading of a log is."""

    names: dict[str, str] = field(default_factory=dict)
    actives: dict[str, ActivePokemon | None] = field(default_factory=lambda: dict.fromkeys(_ROLES))
    turns: list[BattleTurn] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    number: int = 0

    def end_turn(self, number: int) -> None:
        self.turns.append(BattleTurn(self.number, tuple(self.events), tuple(self.actives[role] for role in _ROLES)))
        self.events, self.number = [], number

    def set_condition(self, position: str, condition: str) -> None:
        role, name = position[:2], _name(position)
        hp_percent, status = _read_condition(condition)
        self.actives[role] = ActivePokemon(name, hp_percent, status)

    def describe(self, position: str) -> str:
        """Return "ann's Tauros" for "p1a: Tauros", and the player for "p1: ann"."""
        role, name = position[:2], _name(position)
        player = self.names.get(role, role)
        return player if name == player else f"{player}'s {name}"


def read_battle_log(log: str) -> tuple[BattleTurn, ...]:
    """Return the turns of a battle's public log."""
    reader = _Reader()
    for line in log.split("\n"):
        kind, *words = line.split("|")[1:] or [""]
        if kind == "turn":
            reader.end_turn(int(words[0]))
        elif kind == "player" and len(words) > 1 and words[1]:
            reader.names[words[0]] = words[1]
        elif kind in ("switch", "drag"):
            reader.set_condition(words[0], words[2])
            verb = {"switch": "comes in", "drag": "is dragged in"}[kind]
            reader.events.append(f"{reader.describe(words[0])} {verb}")
        elif kind in ("-damage", "-heal", "-sethp"):
            reader.set_condition(words[0], words[1])
            active = reader.actives[words[0][:2]]
            reader.events.append(f"{reader.describe(words[0])}: {active.hp_percent:.0f} %{_cause(words[2:])}")
        elif kind in _SENTENCES and words:
            reader.events.append(_SENTENCES[kind](reader, words))
        elif kind.startswith("-"):  # a message of a mechanic that has no sentence here
            reader.events.append(" ".join((kind[1:], *(word for word in words if word))))
        if kind == "faint":  # also of Explosion, which no damage is written for
            reader.set_condition(words[0], "0 fnt")
        elif kind == "tie":
            reader.events.append("The battle is a tie.")
    reader.end_turn(0)
    return tuple(reader.turns)


def _name(position: str) -> str:
    return position.partition(": ")[2]


def _read_condition(condition: str) -> tuple[float, str]:
    """Return percent and status of "45/100 par"; a Pokémon that fainted is "0 fnt"."""
    hp, _, status = condition.partition(" ")
    current, _, total = hp.partition("/")
    return (100 * float(current) / float(total) if total else 0.0), status


def _cause(words: list[str]) -> str:
    causes = [word.removeprefix("[from] ") for word in words if word.startswith("[from] ")]
    return f" ({causes[0]})" if causes else ""


def _of(template: str, *, cause: bool = False) -> Callable[[_Reader, list[str]], str]:
    """Return a function that writes a sentence: {who} is the first word's Pokémon or side, {0}, {1} what follows."""

    def write(reader: _Reader, words: list[str]) -> str:
        rest = [word.removeprefix("move: ").removeprefix("ability: ") for word in words[1:]]
        return template.format(*rest, *[""] * 3, who=reader.describe(words[0])) + (_cause(words) if cause else "")

    return write


_SENTENCES: dict[str, Callable[[_Reader, list[str]], str]] = {
    "move": _of("{who} uses {0}"),
    "cant": _of("{who} cannot move ({0})"),
    "faint": _of("{who} faints"),
    "replace": _of("{who} appears"),
    "-supereffective": _of("It is super effective"),
    "-resisted": _of("It is not very effective"),
    "-immune": _of("{who} is immune", cause=True),
    "-crit": _of("A critical hit"),
    "-miss": _of("{who} misses"),
    "-fail": _of("It fails"),
    "-status": lambda reader, words: f"{reader.describe(words[0])} {_STATUS.get(words[1], words[1])}{_cause(words)}",
    "-curestatus": _of("{who} is cured of {0}", cause=True),
    "-boost": _of("{who}: {0} rises by {1}"),
    "-unboost": _of("{who}: {0} falls by {1}"),
    "-start": _of("{who}: {0} begins"),
    "-end": _of("{who}: {0} ends"),
    "-sidestart": _of("{who}'s side: {0} begins"),
    "-sideend": _of("{who}'s side: {0} ends"),
    "-item": _of("{who} has {0}", cause=True),
    "-enditem": _of("{who} loses {0}", cause=True),
    "-ability": _of("{who} has {0}", cause=True),
    "-terastallize": _of("{who} terastallizes to {0}"),
    "-transform": lambda reader, words: f"{reader.describe(words[0])} turns into {_name(words[1])}",
    "-weather": lambda reader, words: "" if "[upkeep]" in words else f"Weather: {words[0]}{_cause(words)}",
    "-fieldstart": lambda reader, words: f"{words[0].removeprefix('move: ')} begins",
    "-fieldend": lambda reader, words: f"{words[0].removeprefix('move: ')} ends",
    "win": lambda reader, words: f"{words[0]} wins.",
}
