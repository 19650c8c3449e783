"""Rooms of the toy game: a winding route from a start to a door, with signs next to it and bells hidden on it."""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pokegemma.errors import PokegemmaError

Cell = tuple[int, int]
"""Column and row of a tile, from the room's top left corner."""

STEPS: dict[str, Cell] = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
ROOM_SIZE = 22


Trail = Literal["redrawn", "painted", "none"]


@dataclass(frozen=True)
class Level:
    """How hard a room is, and what shows the way to the next sign or to the door.

    Attributes:
        open_fraction: share of the other cells that are floor, too.
        trail: "redrawn" is drawn from wherever the player stands. "painted" is painted once for each sign and for the
            door, and is eaten up where the player walks; off it, an arrow next to the player shows the way back. With
            "none" nothing shows the way.
        marks_next: whether the cell to step on stands out from the rest of the trail, which is one bright spot to look
            for; otherwise all cells of the trail look alike, and only those next to the player count.
    """

    num_moves: int
    num_signs: int
    num_bells: int
    open_fraction: float
    trail: Trail
    marks_next: bool = True

    @property
    def is_privileged(self) -> bool:
        """Whether the expert knows what the screen does not show; no measurement of a model uses such a level."""
        return self.trail == "none"


LEVELS = {
    1: Level(num_moves=22, num_signs=2, num_bells=2, open_fraction=0.15, trail="redrawn"),
    2: Level(num_moves=36, num_signs=4, num_bells=3, open_fraction=0.3, trail="redrawn"),
    3: Level(num_moves=36, num_signs=4, num_bells=3, open_fraction=0.3, trail="none"),
    4: Level(num_moves=22, num_signs=2, num_bells=2, open_fraction=0.3, trail="painted"),
    5: Level(num_moves=36, num_signs=4, num_bells=3, open_fraction=0.3, trail="painted"),
    6: Level(num_moves=36, num_signs=4, num_bells=3, open_fraction=0.3, trail="painted", marks_next=False),
}


@dataclass(frozen=True)
class Room:
    """What of a room never changes.

    `floor` has the cells to walk on, without the door; `signs` are in the order in which they are to be read;
    a bell rings when the player first steps on one of `bells`; `directions` is this room's order of preference among
    equally short ways.
    """

    start: Cell
    heading: str
    door: Cell
    floor: frozenset[Cell]
    signs: tuple[Cell, ...]
    bells: frozenset[Cell]
    directions: tuple[str, ...]


def check_level(level: int) -> None:
    """Check that a level exists.

    Raises:
        PokegemmaError: it is not one of `LEVELS`.
    """
    if level not in LEVELS:
        raise PokegemmaError(f"level {level!r} is not one of {', '.join(map(str, LEVELS))}")


def neighbour(cell: Cell, direction: str) -> Cell:
    """Return the cell next to `cell`."""
    return cell[0] + STEPS[direction][0], cell[1] + STEPS[direction][1]


def distances_to(targets: Iterable[Cell], *, floor: frozenset[Cell]) -> dict[Cell, int]:
    """Return the number of steps over `floor` to the nearest of `targets`, for each cell that reaches one.

    By breadth-first search.
    """
    distances = dict.fromkeys(targets, 0)
    queue = deque(distances)
    while queue:
        cell = queue.popleft()
        for direction in STEPS:
            beside = neighbour(cell, direction)
            if beside in floor and beside not in distances:
                distances[beside] = distances[cell] + 1
                queue.append(beside)
    return distances


def _is_inside(cell: Cell) -> bool:
    return all(0 < coordinate < ROOM_SIZE - 1 for coordinate in cell)


def _grow_route(rng: random.Random, *, num_moves: int) -> list[Cell] | None:
    """Return a random walk that never touches itself, so that it is its own shortest way; None where it got stuck.

    Going straight on is no likelier than a turn, so the previous buttons predict little of the next one.
    """
    route = [(ROOM_SIZE // 2, ROOM_SIZE // 2)]
    visited: set[Cell] = set()
    for _ in range(num_moves):
        ways = {name: neighbour(route[-1], name) for name in STEPS}
        ways = {
            name: cell
            for name, cell in ways.items()
            if _is_inside(cell) and cell not in visited and not any(neighbour(cell, name) in visited for name in STEPS)
        }
        if not ways:
            return None
        visited.add(route[-1])
        route.append(rng.choice(list(ways.values())))
    return route


def _place_signs(rng: random.Random, route: list[Cell], *, num_signs: int) -> list[Cell] | None:
    """Return cells next to the route, in its order, one for each sign; None where a cell of it has no free one."""
    signs: list[Cell] = []
    for place in sorted(rng.sample(range(1, len(route) - 2), num_signs)):
        beside = [neighbour(route[place], direction) for direction in STEPS]
        free = [cell for cell in beside if cell not in route and cell not in signs]
        if not free:
            return None
        signs += rng.sample(free, 1)
    return signs


def build_room(rng: random.Random, *, level: int) -> Room:
    """Return a random room of one of `LEVELS`.

    Raises:
        PokegemmaError: there is no such level.
    """
    check_level(level)
    plan = LEVELS[level]
    route = signs = None
    while route is None or signs is None:  # about one route in 4,000 with four signs has no room for them
        route = _grow_route(rng, num_moves=plan.num_moves)
        signs = route and _place_signs(rng, route, num_signs=plan.num_signs)
    cells = {(x, y) for x in range(ROOM_SIZE) for y in range(ROOM_SIZE) if _is_inside((x, y))}
    spare = sorted(cells - set(route) - set(signs))
    opened = rng.sample(spare, int(len(spare) * plan.open_fraction))
    return Room(
        start=route[0],
        heading=rng.choice(list(STEPS)),
        door=route[-1],
        floor=frozenset(route[:-1]) | frozenset(opened),
        signs=tuple(signs),
        bells=frozenset(rng.sample(route[:-1], plan.num_bells)),
        directions=tuple(rng.sample(list(STEPS), len(STEPS))),
    )
