"""The records of a battle in metamon's format: move, Pokémon, state, trajectory; from JSON and to the same bytes.

The names of the fields and their values are metamon's (metamon/interface.py, UniversalState).
"""

import functools
import json
from dataclasses import dataclass, field, fields
from typing import Any

from pokegemma.errors import PokegemmaError

try:
    import orjson
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

NO_ACTION = -1
"""An action that was never revealed, and the filler after the last state."""

MAX_MOVES = 4
"""Files may list more for a transformed Pokémon; metamon takes the first four, and so does everything here."""


class TrajectoryError(PokegemmaError):
    """A file is not a trajectory: what is wrong, and where."""


@dataclass(frozen=True, slots=True)
class TrajectoryMove:
    """A move. `accuracy` is 0..1; `category` is physical, special or status."""

    name: str
    move_type: str
    category: str
    base_power: int
    accuracy: float
    priority: int
    current_pp: int
    max_pp: int


NO_MOVE = TrajectoryMove("nomove", "nomove", "nomove", 0, 1.0, 0, 0, 0)
"""The previous move of a Pokémon that has not moved."""


@dataclass(frozen=True, slots=True)
class TrajectoryPokemon:
    """A Pokémon. `hp_pct` is 0..1; `types` are two words, sorted, "notype" for none; boosts are -6..6."""

    name: str
    hp_pct: float
    types: str
    item: str
    ability: str
    lvl: int
    status: str
    effect: str
    moves: tuple[TrajectoryMove, ...]
    atk_boost: int
    spa_boost: int
    def_boost: int
    spd_boost: int
    spe_boost: int
    accuracy_boost: int
    evasion_boost: int
    base_atk: int
    base_spa: int
    base_def: int
    base_spd: int
    base_spe: int
    base_hp: int
    tera_type: str
    base_species: str


@dataclass(frozen=True, slots=True)
class TrajectoryState:
    """What one player knows when deciding. Conditions, weather and field are the most recent ones."""

    format: str
    player_active_pokemon: TrajectoryPokemon
    opponent_active_pokemon: TrajectoryPokemon
    available_switches: tuple[TrajectoryPokemon, ...]
    player_prev_move: TrajectoryMove
    opponent_prev_move: TrajectoryMove
    opponents_remaining: int
    player_conditions: str
    opponent_conditions: str
    weather: str
    battle_field: str
    forced_switch: bool
    battle_won: bool
    battle_lost: bool
    can_tera: bool
    opponent_teampreview: tuple[str, ...]


def _names(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


@dataclass(frozen=True)
class JsonStyle:
    """In what files of the same content differ: the order of the keys, missing keys of old files, and spaces.

    The default is metamon's own: `json.dumps` of its dataclasses. `spaced` is whether ", " and ": " have their space.
    """

    state_keys: tuple[str, ...] = _names(TrajectoryState)
    pokemon_keys: tuple[str, ...] = _names(TrajectoryPokemon)
    move_keys: tuple[str, ...] = _names(TrajectoryMove)
    spaced: bool = True


@dataclass(frozen=True)
class BattleTrajectory:
    """A battle as one player saw it: states in order, and the action in each.

    The last action is `NO_ACTION`, a filler: a battle of T states has T - 1 usable actions and rewards.
    """

    states: tuple[TrajectoryState, ...]
    actions: tuple[int, ...]
    style: JsonStyle = field(default=JsonStyle(), compare=False)

    @classmethod
    def from_json(cls, text: bytes) -> "BattleTrajectory":
        """Return the trajectory in a file's text.

        Keys that metamon's old files lack get its defaults: can_tera False, opponent_teampreview [], tera_type
        "notype", base_species the name up to a hyphen.

        Raises:
            TrajectoryError: the text is not JSON, or a key is missing, unknown, or has a value of another type.
        """
        try:
            data = orjson.loads(text)
        except ValueError as error:
            raise TrajectoryError(f"not JSON: {error}") from error
        return cls.from_data(data, spaced=b": " in text[:12])

    @classmethod
    def from_data(cls, data: Any, *, spaced: bool = True) -> "BattleTrajectory":
        """Return the trajectory in a file's parsed JSON, whose dictionaries are changed.

        Raises:
            TrajectoryError: as `from_json`.
        """
        if not isinstance(data, dict) or set(data) != {"states", "actions"}:
            raise TrajectoryError('not an object with the keys "states" and "actions"')
        states, actions = data["states"], data["actions"]
        if not isinstance(states, list) or not all(type(state) is dict for state in states):
            raise TrajectoryError("states: not a list of objects")
        if not isinstance(actions, list) or not all(type(action) is int for action in actions):
            raise TrajectoryError("actions: not a list of integers")
        style = _find_style(states, spaced=spaced)
        read = tuple(_state(state, f"states[{index}]", style) for index, state in enumerate(states))
        return cls(read, tuple(actions), style)

    def to_json(self) -> bytes:
        """Return the text of a file: the bytes that `from_json` read, or those of metamon for a new trajectory."""
        data = {"states": [_state_dict(state, self.style) for state in self.states], "actions": list(self.actions)}
        return json.dumps(data, separators=(", ", ": ") if self.style.spaced else (",", ":")).encode()


_TEXT, _NUMBER, _FLAG, _LIST, _OBJECT = (str,), (int, float), (bool,), (list,), (dict,)
_KINDS = {
    "str": _TEXT,
    "int": _NUMBER,
    "float": _NUMBER,
    "bool": _FLAG,
    "TrajectoryMove": _OBJECT,
    "TrajectoryPokemon": _OBJECT,
}
_MAY_LACK = {TrajectoryPokemon: ("tera_type", "base_species"), TrajectoryState: ("can_tera", "opponent_teampreview")}


def _kind_of(annotation: Any) -> tuple[type, ...]:
    return _KINDS.get(getattr(annotation, "__name__", ""), _LIST) if isinstance(annotation, type) else _LIST


@functools.lru_cache(4096)
def _problem(record: type, keys: tuple[str, ...], kinds: tuple[type, ...]) -> str:
    """Return what is wrong with an object of these keys and types of values; "" for nothing."""
    allowed = {each.name: _kind_of(each.type) for each in fields(record)}
    if missing := sorted(set(allowed) - set(keys) - set(_MAY_LACK.get(record, ()))):
        return f"no {missing[0]!r}"
    for key, kind in zip(keys, kinds, strict=True):
        if key not in allowed:
            return f"unknown key {key!r}"
        if kind not in allowed[key]:
            return f"{key} is of type {kind.__name__}"
    return ""


def _check(record: type, data: Any, where: str, keys: tuple[str, ...]) -> None:
    if type(data) is not dict:
        raise TrajectoryError(f"{where}: not an object")
    if problem := _problem(record, tuple(data), tuple(map(type, data.values()))):
        raise TrajectoryError(f"{where}: {problem}")
    if tuple(data) != keys and set(data) != set(keys):  # `to_json` would lose or invent some
        raise TrajectoryError(f"{where}: other keys than in states[0]")


def _move(data: Any, where: str, style: JsonStyle) -> TrajectoryMove:
    _check(TrajectoryMove, data, where, style.move_keys)
    return TrajectoryMove(**data)


def _pokemon(data: Any, where: str, style: JsonStyle) -> TrajectoryPokemon:
    _check(TrajectoryPokemon, data, where, style.pokemon_keys)
    data["moves"] = tuple(_move(move, f"{where}.moves[{index}]", style) for index, move in enumerate(data["moves"]))
    data.setdefault("tera_type", "notype")
    data.setdefault("base_species", data["name"].partition("-")[0].strip())
    return TrajectoryPokemon(**data)


def _state(data: Any, where: str, style: JsonStyle) -> TrajectoryState:
    _check(TrajectoryState, data, where, style.state_keys)
    for key in ("player_active_pokemon", "opponent_active_pokemon"):
        data[key] = _pokemon(data[key], f"{where}.{key}", style)
    for key in ("player_prev_move", "opponent_prev_move"):
        data[key] = _move(data[key], f"{where}.{key}", style)
    data["available_switches"] = tuple(
        _pokemon(each, f"{where}.available_switches[{index}]", style)
        for index, each in enumerate(data["available_switches"])
    )
    data.setdefault("can_tera", False)
    preview = data.setdefault("opponent_teampreview", [])
    if not all(type(name) is str for name in preview):
        raise TrajectoryError(f"{where}.opponent_teampreview: not a list of names")
    data["opponent_teampreview"] = tuple(preview)
    return TrajectoryState(**data)


def _find_style(states: list[dict[str, Any]], *, spaced: bool) -> JsonStyle:
    """Return the order of the keys in the first state; where it has none, metamon's."""
    first = states[0] if states else {}
    pokemon, move = first.get("player_active_pokemon"), first.get("player_prev_move")
    if not isinstance(pokemon, dict) or not isinstance(move, dict):
        return JsonStyle(spaced=spaced)
    return JsonStyle(tuple(first), tuple(pokemon), tuple(move), spaced)


def _move_dict(move: TrajectoryMove, style: JsonStyle) -> dict[str, Any]:
    return {key: getattr(move, key) for key in style.move_keys}


def _pokemon_dict(pokemon: TrajectoryPokemon, style: JsonStyle) -> dict[str, Any]:
    data = {key: getattr(pokemon, key) for key in style.pokemon_keys}
    data["moves"] = [_move_dict(move, style) for move in pokemon.moves]
    return data


def _state_dict(state: TrajectoryState, style: JsonStyle) -> dict[str, Any]:
    data = {key: getattr(state, key) for key in style.state_keys}
    for key in ("player_active_pokemon", "opponent_active_pokemon"):
        data[key] = _pokemon_dict(data[key], style)
    for key in ("player_prev_move", "opponent_prev_move"):
        data[key] = _move_dict(data[key], style)
    data["available_switches"] = [_pokemon_dict(each, style) for each in state.available_switches]
    if "opponent_teampreview" in data:
        data["opponent_teampreview"] = list(data["opponent_teampreview"])
    return data
