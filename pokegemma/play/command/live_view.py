"""Show play while it happens: screen and probabilities in a terminal, a line for each turn elsewhere."""

import shutil
from typing import TextIO

import numpy as np
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.play.recording.journal import PlayedTurn

_PANEL_COLUMNS = 34
_BAR_COLUMNS = 16
_HALF_BLOCK = "▀"


def describe_turn(turn: PlayedTurn) -> str:
    """Return a turn as one line of text.

    Example: "   12  up      98 %  the path leads up", or "   13  left    noise, up was chosen (61 %)"
    """
    pressed = turn.pressed[0] if turn.pressed else "nothing"
    sure = "" if turn.probabilities is None else f"{turn.probabilities[BUTTONS.index(turn.button)]:.0%}"
    if pressed == turn.button:
        note = f"{sure:>5}  {turn.reasoning}"
    else:
        who = turn.decided_by.partition(":")[0]
        note = f"  {who}, {turn.button} was chosen" + (f" ({sure})" if sure else "")
    return f"{turn.number:5d}  {pressed:<7}{' '.join(note.split()) if pressed != turn.button else note}".rstrip()


class LiveView:
    """Draw each turn on `stream`; see `describe_turn` for streams that are no terminal.

    The screen is drawn in coloured half blocks, two pixels a character, with a bar for each button next to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._in_terminal = stream, stream.isatty()
        self._num_lines = 0

    def show(self, turn: PlayedTurn, screen: Image.Image) -> None:
        """Draw a turn over the one before."""
        if not self._in_terminal:
            print(describe_turn(turn), file=self._stream, flush=True)
            return
        columns, lines = shutil.get_terminal_size()
        picture = draw_blocks(screen, columns=columns - _PANEL_COLUMNS, rows=lines - 2)
        panel = panel_lines(turn)
        height = max(len(picture), len(panel))
        picture += [""] * (height - len(picture))
        panel += [""] * (height - len(panel))
        start = f"\x1b[{self._num_lines}F" if self._num_lines else ""
        rows = [f"{left}\x1b[0m  {right}\x1b[K" for left, right in zip(picture, panel, strict=True)]
        self._stream.write(start + "\n".join(rows) + "\n")
        self._stream.flush()
        self._num_lines = height


def draw_blocks(screen: Image.Image, *, columns: int, rows: int) -> list[str]:
    """Return a picture as lines of half blocks, at most so many columns and rows; [] where less than 24 columns fit."""
    scale = min(columns / screen.width, 2 * rows / screen.height, 0.5)
    width, height = int(screen.width * scale), int(screen.height * scale) // 2 * 2
    if width < 24 or height < 2:
        return []
    pixels = np.asarray(screen.resize((width, height), Image.Resampling.BOX)).astype(int)
    lines = []
    for top, bottom in zip(pixels[::2], pixels[1::2], strict=True):
        cells, last = [], None
        for upper, lower in zip(top.tolist(), bottom.tolist(), strict=True):
            if (upper, lower) != last:
                cells.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*upper, *lower))
                last = (upper, lower)
            cells.append(_HALF_BLOCK)
        lines.append("".join(cells))
    return lines


def panel_lines(turn: PlayedTurn) -> list[str]:
    """Return the text next to the screen: number, a bar for each button, the reason."""
    lines = [f"turn {turn.number}", ""]
    for index, button in enumerate(BUTTONS):
        mark = ">" if button in turn.pressed else " "
        bar = ""
        if turn.probabilities is not None:
            value = turn.probabilities[index]
            bar = f"{'█' * round(_BAR_COLUMNS * value):<{_BAR_COLUMNS}} {value:4.0%}"
        lines.append(f"{mark} {button:<7}{bar}")
    reason = " ".join(turn.reasoning.split())
    width = _PANEL_COLUMNS - 4
    wrapped = [reason[at : at + width] for at in range(0, min(len(reason), 4 * width), width)]
    by = turn.decided_by.partition(":")[0]
    return [*lines, "", f"by {by}", *wrapped]
