"""Draw the picture of README.md: a trained model plays a room of the toy game that it has not seen, as a ROM in mGBA.

python docs/make_picture.py --model_path outputs/toy/merged

Left the screen, right the probability that the model gives each button; the button that is pressed is coloured. Some of
the frames between two decisions are shown, too.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pokegemma.cli import parse_options, run
from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import CheckFailedError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.evaluation.view import resolve_window
from pokegemma.options import option
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.retro_console import RetroConsole
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.history import PlayView
from pokegemma.play.players import ButtonChoice
from pokegemma.play.rom.build import build_rom
from pokegemma.play.rom.state import STATE_ADDRESS, STATE_BYTES, parse_state
from pokegemma.play.toy.world import ToyWorld

SCALE = 2
SCREEN = (240 * SCALE, 160 * SCALE)
PANEL_WIDTH, ROW_HEIGHT, BAR_WIDTH = 240, 36, 112
BACKGROUND, INK, BAR, CHOSEN = (250, 250, 247), (45, 45, 48), (176, 184, 196), (214, 69, 65)
TURN_MS, LAST_TURN_MS, FRAME_MS = 550, 2000, 1000 / 60
FILM_EVERY = 8
"""One of so many frames between two decisions is shown."""
NUM_COLOURS = 48


@dataclass
class PictureOptions:
    model_path: str = option("outputs/toy/merged", "Merged checkpoint of the demonstration.")
    output: str = option("docs/toy_game.gif", "GIF to write.")
    seed: int = option(11, "Room to play; recordings never use rooms of whole numbers.")
    num_turns: int = option(40, "Stop after this many turns, if the room is not done before.")


class FilmedConsole(RetroConsole):
    """A console that keeps the picture of each frame in `film`."""

    def __init__(self, path: Path):
        self.film: list[Image.Image] = []
        super().__init__(read_rom(path))

    def step(self, frames: int) -> None:
        for _ in range(frames):
            super().step(1)
            self.film.append(self.picture())

    @property
    def is_done(self) -> bool:
        return parse_state(self.read_memory(STATE_ADDRESS, STATE_BYTES)).is_done


def play(options: PictureOptions) -> list[tuple[Image.Image, int]]:
    """Return the pictures with the milliseconds for which each is shown."""
    player = CachedPlayer(
        load_predictor(options.model_path, layout="grid"), PlayView("grid", resolve_window(options.model_path))
    )
    player.start(ToyWorld(options.seed).goal)
    with tempfile.TemporaryDirectory() as folder:
        rom = Path(folder) / "toy.gba"
        rom.write_bytes(build_rom(options.seed))
        console = FilmedConsole(rom)
    game, pictures = FrameEmulator(console, timing=PressTiming()), []
    for _ in range(options.num_turns):
        screen = game.screen()
        choice = player.decide(screen)
        pictures.append((draw_turn(screen, choice), TURN_MS))
        console.film.clear()
        game.press(choice.button)
        pictures += [(draw_turn(frame, choice), round(FILM_EVERY * FRAME_MS)) for frame in moving(console.film)]
        player.pressed(choice.button)
        if console.is_done:
            break
    else:
        raise CheckFailedError(f"--seed {options.seed}: the model did not leave the room in {options.num_turns} turns")
    pictures.append((draw_turn(game.screen(), ButtonChoice(None, np.zeros(len(BUTTONS)))), LAST_TURN_MS))
    game.close()
    return pictures


def moving(film: Sequence[Image.Image]) -> list[Image.Image]:
    """Return every `FILM_EVERY`th frame from the first change to the last."""
    shown = [frame.tobytes() for frame in film]
    first = next((number for number, frame in enumerate(shown) if frame != shown[0]), len(shown))
    last = next(number for number, frame in enumerate(shown) if frame == shown[-1])
    return list(film[first + FILM_EVERY - 1 : last : FILM_EVERY])


def draw_turn(screen: Image.Image, choice: ButtonChoice) -> Image.Image:
    """Return the screen, with a bar for each button next to it."""
    picture = Image.new("RGB", (SCREEN[0] + PANEL_WIDTH, SCREEN[1]), BACKGROUND)
    picture.paste(screen.resize(SCREEN, Image.Resampling.NEAREST))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    top = (SCREEN[1] - ROW_HEIGHT * len(BUTTONS)) // 2
    for number, (button, probability) in enumerate(zip(BUTTONS, choice.probabilities, strict=True)):
        colour = CHOSEN if button == choice.button else BAR
        left, middle = SCREEN[0] + 72, top + ROW_HEIGHT * number + ROW_HEIGHT // 2
        draw.text((left - 10, middle), button, INK if button != choice.button else CHOSEN, font, anchor="rm")
        draw.rectangle((left, middle - 8, left + 2 + round(BAR_WIDTH * probability), middle + 8), colour)
        if probability >= 0.005:
            place = (left + 8 + round(BAR_WIDTH * probability), middle)
            draw.text(place, f"{probability:.0%}", INK, font, anchor="lm")
    return picture


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of one size as one, from top to bottom: its colours are those of all."""
    width, height = pictures[0].size
    stacked = Image.new("RGB", (width, height * len(pictures)))
    for number, picture in enumerate(pictures):
        stacked.paste(picture, (0, height * number))
    return stacked


def main() -> None:
    (options,) = parse_options(PictureOptions, description=__doc__)
    pictures, durations = zip(*play(options), strict=True)
    palette = stack(pictures).quantize(NUM_COLOURS)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    first.save(options.output, save_all=True, append_images=others, duration=list(durations), loop=0, optimize=True)
    print(f"{options.output}: {len(pictures)} pictures, {Path(options.output).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    run(main)
