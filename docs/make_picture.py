"""Draw the picture of README.md: a trained model plays a room of the toy game that it has not seen.

python docs/make_picture.py --model_path outputs/toy/merged

Left the screen, right the probability that the model gives each button; the button that is pressed is coloured.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pokegemma.cli import parse_options, run
from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import CheckFailedError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.evaluation.view import resolve_window
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.history import PlayView
from pokegemma.play.toy.world import ToyWorld

SCALE = 2
SCREEN = (240 * SCALE, 160 * SCALE)
PANEL_WIDTH, ROW_HEIGHT, BAR_WIDTH = 240, 36, 112
BACKGROUND, INK, BAR, CHOSEN = (250, 250, 247), (45, 45, 48), (176, 184, 196), (214, 69, 65)
FRAME_MS, LAST_FRAME_MS = 550, 2000


@dataclass
class PictureOptions:
    model_path: str = field(default="outputs/toy/merged", metadata={"help": "Merged checkpoint of the demonstration."})
    output: str = field(default="docs/toy_game.gif", metadata={"help": "GIF to write."})
    seed: int = field(default=5, metadata={"help": "Room to play; recordings never use rooms of whole numbers."})
    num_turns: int = field(default=40, metadata={"help": "Stop after this many turns, if the room is not done before."})


def play(options: PictureOptions) -> list[Image.Image]:
    """Return one picture for each turn, and the screen after the last."""
    world = ToyWorld(options.seed)
    player = CachedPlayer(
        load_predictor(options.model_path, layout="grid"), PlayView("grid", resolve_window(options.model_path))
    )
    player.start(world.goal)
    pictures = []
    while not world.is_done and len(pictures) < options.num_turns:
        screen = world.render()
        decision = player.decide(screen)
        pictures.append(draw_turn(screen, decision.button, decision.probabilities))
        world.press(decision.button)
        player.pressed(decision.button)
    if not world.is_done:
        raise CheckFailedError(f"--seed {options.seed}: the model did not leave the room in {options.num_turns} turns")
    pictures.append(draw_turn(world.render(), None, np.zeros(len(BUTTONS))))
    return pictures


def draw_turn(screen: Image.Image, chosen: str | None, probabilities: np.ndarray) -> Image.Image:
    """Return the screen, with a bar for each button next to it."""
    picture = Image.new("RGB", (SCREEN[0] + PANEL_WIDTH, SCREEN[1]), BACKGROUND)
    picture.paste(screen.resize(SCREEN, Image.Resampling.NEAREST))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    top = (SCREEN[1] - ROW_HEIGHT * len(BUTTONS)) // 2
    for number, (button, probability) in enumerate(zip(BUTTONS, probabilities, strict=True)):
        colour = CHOSEN if button == chosen else BAR
        left, middle = SCREEN[0] + 72, top + ROW_HEIGHT * number + ROW_HEIGHT // 2
        draw.text((left - 10, middle), button, INK if button != chosen else CHOSEN, font, anchor="rm")
        draw.rectangle((left, middle - 8, left + 2 + round(BAR_WIDTH * probability), middle + 8), colour)
        if probability >= 0.005:
            place = (left + 8 + round(BAR_WIDTH * probability), middle)
            draw.text(place, f"{probability:.0%}", INK, font, anchor="lm")
    return picture


def main() -> None:
    (options,) = parse_options(PictureOptions, description=__doc__)
    pictures = play(options)
    palette = pictures[0].quantize(64)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    first.save(options.output, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    print(f"{options.output}: {len(pictures)} pictures, {Path(options.output).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    run(main)
