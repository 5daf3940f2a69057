"""The pictures: heat laid over a photo, a photo with dropped patches faded, and the row of the paper's Figure 4."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont

from iared2.report.colours import colour
from iared2.tokens.grid import to_pixels

HEAT = 0.6  # share of the heat in an overlay; the rest is the photo in grey
FADE = 0.8  # share of the pale tone where a patch was dropped
PALE = (226, 229, 236)
GAP = 12
MOST_IN_A_ROW = 5
SMALLEST, LARGEST = 320, 720  # bounds for the sides of a panel in pixels


def overlay(photo: Image.Image, scores: Float[np.ndarray, "h w"]) -> Image.Image:
    """Scores in [0, 1], interpolated bilinearly to the photo's own size and laid over it as colour.

    The photo under the heat is grey, so that every colour in the picture is a score.
    """
    maps = to_pixels(torch.from_numpy(np.ascontiguousarray(scores, np.float32))[None], (photo.height, photo.width))[0]
    return Image.blend(photo.convert("L").convert("RGB"), Image.fromarray(colour(maps.numpy())), HEAT)


def faded(photo: Image.Image, kept: Bool[np.ndarray, "h w"]) -> Image.Image:
    """The photo with dropped patches pale and grey."""
    rows, columns = (_cells(side, count) for side, count in zip((photo.height, photo.width), kept.shape, strict=True))
    gone = Image.fromarray(np.where(kept[np.ix_(rows, columns)], 0, 255).astype(np.uint8))
    pale = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, PALE), FADE)
    return Image.composite(pale, photo, gone)


def _cells(side: int, count: int) -> np.ndarray:
    """The patch of every pixel along one side."""
    return np.minimum((np.arange(side) + 0.5) * count / side, count - 1).astype(int)


def panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) at which a photo is shown: small ones larger, large ones smaller, nothing squeezed."""
    width, height = size
    scale = max(SMALLEST / min(size), 1) if max(size) < LARGEST else LARGEST / max(size)
    scale = min(scale, LARGEST / max(size))
    return max(1, round(width * scale)), max(1, round(height * scale))


def panel(photo: Image.Image) -> Image.Image:
    """The photo at its panel size."""
    return photo if photo.size == panel_size(photo.size) else photo.resize(panel_size(photo.size), Image.Resampling.LANCZOS)


def hierarchy(photo: Image.Image, kept: Sequence[Bool[np.ndarray, "h w"]]) -> Image.Image:
    """Figure 4: the photo, then one panel per group with dropped patches faded and the kept share in the corner."""
    first = panel(photo)
    return _sheet([first] + [badged(faded(first, k), f"{100 * k.mean():.0f} %") for k in kept])


def side_by_side(photo: Image.Image, maps: Mapping[str, Float[np.ndarray, "_h _w"]]) -> Image.Image:
    """The photo, then one panel per method, its map stretched to [0, 1] and laid over the photo, its name in the corner."""
    first = panel(photo)
    return _sheet([first] + [badged(overlay(first, stretched(values)), name) for name, values in maps.items()])


def stretched(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """From zero at the least value to one at the greatest; a map that is the same everywhere is zero."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _sheet(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels of one size in rows."""
    first = panels[0]
    per_row = _per_row(first.size, len(panels))
    lines = math.ceil(len(panels) / per_row)
    width, height = first.width + GAP, first.height + GAP
    sheet = Image.new("RGB", (per_row * width - GAP, lines * height - GAP), "white")
    for place, picture in enumerate(panels):
        sheet.paste(picture, (place % per_row * width, place // per_row * height))
    return sheet


def _per_row(size: tuple[int, int], panels: int) -> int:
    """All in one row, unless that would be a ribbon: wide photos stand below one another, and many panels in several rows."""
    width, height = size
    if width > 3 * height:
        return 1
    return math.ceil(panels / math.ceil(panels / MOST_IN_A_ROW))


def badged(picture: Image.Image, text: str) -> Image.Image:
    """Writes `text` into the upper left corner, light on a dark plate."""
    size = max(12, min(picture.size) // 11)
    font = ImageFont.truetype(font_file(), size)
    draw = ImageDraw.Draw(picture, "RGBA")
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    inset, pad = size // 2, size // 3
    plate = (inset, inset, inset + right - left + 2 * pad, inset + bottom - top + 2 * pad)
    draw.rounded_rectangle(plate, radius=size // 3, fill=(17, 22, 34, 220))
    draw.text((inset + pad - left, inset + pad - top), text, font=font, fill="white")
    return picture


@cache
def font_file() -> str:
    """The bold font that matplotlib brings along."""
    import matplotlib as mpl

    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf")
