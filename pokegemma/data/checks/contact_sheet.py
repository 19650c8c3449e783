"""A PNG of random samples with their answers, for a person to look at."""

import random
import textwrap
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pokegemma.data.checks.records import Split
from pokegemma.data.frame_pictures import UNREADABLE, to_rgb
from pokegemma.data.prompts import AnswerError, Layout, parse_answer
from pokegemma.data.samples import Sample
from pokegemma.outputs import atomic_file

NUM_SAMPLES = 12

_COLUMNS = 4
_PICTURE_PX = (480, 320)
_CAPTION_PX = 190
_MARGIN_PX = 12
_BACKGROUND, _TEXT, _FAINT, _ACCENT, _ERROR = "#ffffff", "#1b1b1b", "#666666", "#0b5394", "#b00020"


def draw_samples(splits: Iterable[Split], *, number: int = NUM_SAMPLES, seed: int = 0) -> list[tuple[Split, Sample]]:
    """Return `number` samples drawn at random from all splits, in file order; fewer if there are not as many."""
    generator, drawn = random.Random(seed), []
    located = ((split, sample) for split in splits for sample in split.samples())
    for count, item in enumerate(located):
        if count < number:
            drawn.append((count, item))
        elif (place := generator.randrange(count + 1)) < number:
            drawn[place] = (count, item)
    return [item for _, item in sorted(drawn, key=lambda entry: entry[0])]


def _paste_pictures(sheet: Image.Image, corner: tuple[int, int], paths: list[Path]) -> None:
    """Paste pictures into the box at `corner`: one fills it, several share it row by row, oldest first."""
    columns = 1 if len(paths) == 1 else 2 if len(paths) <= 4 else 4
    rows = -(-len(paths) // columns)
    width, height = _PICTURE_PX[0] // columns, _PICTURE_PX[1] // rows
    for at, path in enumerate(paths):
        left, top = corner[0] + at % columns * width, corner[1] + at // columns * height
        try:
            with Image.open(path) as image:
                picture = to_rgb(image)
        except UNREADABLE:
            draw = ImageDraw.Draw(sheet)
            draw.rectangle((left, top, left + width - 1, top + height - 1), outline=_ERROR, width=3)
            draw.text((left + 10, top + 10), "cannot be read", fill=_ERROR, font=ImageFont.load_default(size=18))
            continue
        picture.thumbnail((width, height))  # only makes smaller
        scale = min(width // picture.width, height // picture.height)
        if scale > 1:
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))


def _write_caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], split: Split, sample: Sample) -> None:
    left, top = corner
    small = ImageFont.load_default(size=15)
    try:
        answer = parse_answer(sample.output)
        button, reasoning, colour = answer.button, f"{answer.reasoning} ({answer.context or 'no context'})", _ACCENT
    except AnswerError as error:
        button, reasoning, colour = "no answer", str(error), _ERROR
    draw.text((left, top), button, fill=colour, font=ImageFont.load_default(size=32))
    draw.text((left + 170, top + 2), f"{split.name} {sample.id}", fill=_FAINT, font=small)
    before = " ".join(sample.previous_buttons) or "none"
    draw.text((left + 170, top + 22), textwrap.shorten(f"before: {before}", 44), fill=_FAINT, font=small)
    reasoning = reasoning.encode(errors="replace").decode()  # an escaped half of a surrogate pair cannot be drawn
    # A snake_case reasoning has no place to break a line at.
    lines = textwrap.wrap(reasoning, 62, max_lines=4, placeholder=" …")
    lines += textwrap.wrap(f"Goal: {sample.metadata.get('goal') or 'none given'}", 62, max_lines=2, placeholder=" …")
    draw.multiline_text((left, top + 46), "\n".join(lines), fill=_TEXT, font=small, spacing=5)


def write_contact_sheet(
    splits: Iterable[Split], path: Path, *, layout: Layout, number: int = NUM_SAMPLES, seed: int = 0
) -> int:
    """Write the contact sheet and return how many samples it shows; writes nothing if there are none.

    A picture that cannot be read is drawn as a red frame: `picture_checks` reports it.
    """
    drawn = draw_samples(splits, number=number, seed=seed)
    if not drawn:
        return 0
    columns = min(_COLUMNS, len(drawn))
    cell = (_PICTURE_PX[0] + _MARGIN_PX, _PICTURE_PX[1] + _CAPTION_PX + _MARGIN_PX)
    size = (columns * cell[0] + _MARGIN_PX, -(-len(drawn) // columns) * cell[1] + _MARGIN_PX)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for at, (split, sample) in enumerate(drawn):
        left, top = _MARGIN_PX + at % columns * cell[0], _MARGIN_PX + at // columns * cell[1]
        grid = layout == "grid" and sample.image is not None
        _paste_pictures(
            sheet, (left, top), [split.folder / name for name in ([sample.image] if grid else sample.frames)]
        )
        _write_caption(draw, (left, top + _PICTURE_PX[1] + 6), split, sample)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return len(drawn)
