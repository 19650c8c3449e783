"""A small scripted game: follow a winding path, read the signs, answer the bell with the menu, leave by the door."""

import random
from typing import Any

from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.play.toy import art
from pokegemma.play.toy.rooms import LEVELS, STEPS, Cell, build_room, distances_to, neighbour

_GOALS = (
    "Follow the path, read the signs, check the menu when the bell rings, leave by the door",
    "Leave the room by its door; every sign must be read, and the menu opened whenever the bell rings",
    "Find the way out. Read all signs on the way and look at the menu each time a bell rings",
)


class ToyWorld:
    """One room, played with the eight buttons. The same seed and level give the same room, pixel for pixel.

    Directions turn the player, and move them where the way is free. `a` opens the text of the sign that the player
    faces, `b` closes it; `start` opens the menu, `select` closes it. The door opens when every sign has been read.
    A button that means nothing at the moment does nothing. On levels with a trail the expert's button can be told from
    one frame alone: the cue for it stands at the centre, and at most one kind of cue is drawn at a time. The exception
    is the arrow of a painted trail, which counts for more than the paint.
    """

    def __init__(self, seed: int | str, *, level: int = 1):
        rng = random.Random(f"toy world {level} {seed}")
        self.room = build_room(rng, level=level)
        self._level = LEVELS[level]
        self.trail = self._level.trail
        self.art = art.RoomArt(self.room, rng)
        self.goal: str = rng.choice(_GOALS)
        self._player, self._facing = self.room.start, self.room.heading
        self._open: str | None = None
        self._unread = list(self.room.signs)
        self._silent_bells = set(self.room.bells)
        self._bell_rings = False
        self._distances: tuple[Cell, dict[Cell, int]] | None = None
        self._painted = self._way_on() if self.trail == "painted" else []
        self._step_on(self._player)

    @property
    def painted(self) -> tuple[Cell, ...]:
        """The cells of a painted trail that are left, the next first."""
        return tuple(self._painted)

    @property
    def facing(self) -> str:
        """The direction that the player faces."""
        return self._facing

    @property
    def is_done(self) -> bool:
        """Whether the player has left through the door."""
        return self._player == self.room.door

    @property
    def situation(self) -> str:
        """What the picture shows: done, dialogue, menu, bell, sign (the next one, faced), off_trail or navigation.

        The player is off a painted trail where not exactly one of the four cells around is painted.
        """
        if self.is_done:
            return "done"
        if self._open:
            return self._open
        if self._bell_rings:
            return "bell"
        if self._unread and self._faced == self._unread[0]:
            return "sign"
        if self.trail == "painted" and len(self._painted_directions) != 1:
            return "off_trail"
        return "navigation"

    def expert_button(self) -> str:
        """Return the button that leads on from any state; "b" when there is nothing left to do."""
        situation = self.situation
        if situation == "off_trail":
            return self._way_back()
        if situation == "navigation":
            return self._painted_directions[0] if self.trail == "painted" else self._way_from(self._player)
        return {"done": "b", "dialogue": "b", "menu": "select", "bell": "start", "sign": "a"}[situation]

    def press(self, button: str) -> bool:
        """Press one of `BUTTONS`; return whether that changed anything.

        Raises:
            ValueError: there is no such button.
        """
        if button not in BUTTONS:
            raise ValueError(f"{button!r} is not one of {', '.join(BUTTONS)}")
        if self.is_done:
            return False
        if self._open:
            return self._press_in_window(button)
        if button in STEPS:
            return self._walk(button)
        if button == "start":
            self._open = "menu"
        elif button == "a" and self._faced in self.room.signs:
            self._open = "dialogue"
        return self._open is not None

    def render(self) -> Image.Image:
        """Return what the player sees now: RGB, 240x160."""
        situation = self.situation
        shown: dict[str, Any] = {"facing": self._facing, "situation": situation}
        if self.trail == "painted" and situation in ("navigation", "off_trail"):
            shown |= {"trail": self._painted, "looks_alike": not self._level.marks_next}
        elif self.trail == "redrawn" and situation == "navigation":
            shown["trail"] = self._way_on()
        if situation == "off_trail":
            shown["arrow"] = self._way_back()
        elif shown.get("trail"):
            shown["marked"] = neighbour(self._player, self.expert_button())
        return self.art.draw(self._player, **shown)

    @property
    def _faced(self) -> Cell:
        return neighbour(self._player, self._facing)

    @property
    def _target(self) -> Cell:
        return self._unread[0] if self._unread else self.room.door

    @property
    def _painted_directions(self) -> list[str]:
        return [name for name in STEPS if neighbour(self._player, name) in self._painted]

    def _press_in_window(self, button: str) -> bool:
        if (self._open, button) == ("dialogue", "b"):
            if self._faced in self._unread:
                self._read(self._faced)
        elif (self._open, button) == ("menu", "select"):
            self._bell_rings = False
        else:
            return False
        self._open = None
        return True

    def _read(self, sign: Cell) -> None:
        """Note that a sign was read; where it was the next one, paint the way to what comes after it."""
        before = self._target
        self._unread.remove(sign)
        if self.trail == "painted" and self._target != before:
            self._painted = self._way_on()

    def _walk(self, direction: str) -> bool:
        turned, self._facing = self._facing != direction, direction
        cell = self._faced
        if cell in self.room.floor or (cell == self.room.door and not self._unread):
            self._step_on(cell)
            return True
        return turned

    def _step_on(self, cell: Cell) -> None:
        self._player = cell
        if cell in self._painted:
            del self._painted[: self._painted.index(cell) + 1]
        if cell in self._silent_bells:
            self._silent_bells.remove(cell)
            self._bell_rings = True

    def _way_from(self, cell: Cell) -> str:
        """Return the direction of a shortest way from `cell` to the next sign, or to the door when all are read."""
        if self._distances is None or self._distances[0] != self._target:
            self._distances = self._target, distances_to([self._target], floor=self.room.floor)
        return self._descend(cell, self._distances[1])

    def _way_back(self) -> str:
        """Return the direction of a shortest way from the player to the nearest painted cell."""
        return self._descend(self._player, distances_to(self._painted, floor=self.room.floor))

    def _descend(self, cell: Cell, distances: dict[Cell, int]) -> str:
        nearer = distances[cell] - 1
        return next(name for name in self.room.directions if distances.get(neighbour(cell, name)) == nearer)

    def _way_on(self) -> list[Cell]:
        """Return the cells from the one after the player's to the target."""
        trail = [self._player]
        while trail[-1] != self._target:
            trail.append(neighbour(trail[-1], self._way_from(trail[-1])))
        return trail[1:]
