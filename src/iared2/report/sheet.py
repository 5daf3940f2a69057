"""Many photos on one picture, as in the paper's Figures 3, 4, 6 and 7: a row of panels per photo, titles above, rows numbered."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont

from iared2.report.pictures import badged, faded, font_file, overlay, stretched

SIDE = 168  # of a panel in pixels
GAP = 6
NUMBER = 34  # width of the column that holds a row's number
HEAD = 30  # height of the titles
WIDEST = 1700  # pixels, beyond which photos stand below one another and no longer in several columns
INK = (17, 22, 34)


def central(photo: Image.Image) -> Image.Image:
    """The central square of a photo: nothing is squeezed."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def square(photo: Image.Image) -> Image.Image:
    """The central square as a panel."""
    return central(photo).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def heat_panels(photo: Image.Image, maps: Mapping[str, Float[np.ndarray, "_h _w"]]) -> list[Image.Image]:
    """A row of Figure 3: the square photo, then each map over it, stretched to [0, 1]."""
    panel = square(photo)
    return [panel, *(overlay(panel, stretched(values)) for values in maps.values())]


def kept_panels(photo: Image.Image, kept: Sequence[Bool[np.ndarray, "_h _w"]]) -> list[Image.Image]:
    """A row of Figure 4: the square photo, then what each group leaves, the kept share in the upper left corner."""
    panel = square(photo)
    return [panel, *(badged(faded(panel, one), f"{100 * one.mean():.0f} %") for one in kept)]


def contact_sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], most_columns: int = 2) -> Image.Image:
    """Rows of panels under titles, in as many columns as fit, filled from the top down.

    Args:
        rows: for each photo as many panels as there are titles, all of `SIDE` pixels.
        most_columns: of photos beside one another.
    """
    wide = NUMBER + len(titles) * (SIDE + GAP)
    columns = max(1, min(most_columns, len(rows), WIDEST // wide))
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (columns * wide + GAP, HEAD + lines * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for place, title in enumerate(titles):
            middle = column * wide + NUMBER + place * (SIDE + GAP) + SIDE // 2
            _write(draw, (middle, HEAD // 2), title, 15)
    for number, panels in enumerate(rows):
        left, top = number // lines * wide, HEAD + number % lines * (SIDE + GAP)
        _write(draw, (left + NUMBER // 2, top + SIDE // 2), str(number + 1), 14)
        for place, panel in enumerate(panels):
            sheet.paste(panel, (left + NUMBER + place * (SIDE + GAP), top))
    return sheet


def _write(draw: ImageDraw.ImageDraw, middle: tuple[int, int], text: str, size: int) -> None:
    """Text around a point, smaller where it would not fit above its panel."""
    font = ImageFont.truetype(font_file(), size)
    while size > 8 and font.getlength(text) > SIDE:
        size -= 1
        font = ImageFont.truetype(font_file(), size)
    draw.text(middle, text, font=font, fill=INK, anchor="mm")
