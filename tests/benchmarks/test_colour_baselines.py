"""The colours that a regression gets."""

from PIL import Image

from benchmarks.colour_baselines import mean_colours


def test_mean_colours_are_those_of_equal_parts_row_by_row() -> None:
    picture = Image.new("RGB", (4, 2), (0, 0, 0))
    picture.putpixel((2, 0), (255, 0, 0))
    picture.putpixel((3, 0), (255, 0, 0))
    picture.putpixel((0, 1), (0, 0, 255))
    assert mean_colours(picture, columns=2, rows=2).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0.5, 0, 0, 0]
    assert mean_colours(picture, columns=1, rows=1).tolist() == [0.25, 0, 0.125]
