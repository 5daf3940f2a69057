"""One self-contained page over all photos of a run: pictures inside, no network, readable by keyboard and screen reader."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from iared2.data.pictures import Failure
from iared2.explain import Speed
from iared2.report import viewer
from iared2.report.colours import NAME, css_gradient
from iared2.report.pictures import HEAT, PALE, SMALLEST, panel
from iared2.report.records import PhotoRecord, RunFacts, versions

# the more photos, the smaller each picture on the page: it stays one file that a browser opens
_SIDES = ((60, 560), (400, 360))
_LAST_SIDE = 240


def thumbnail_side(photos: int) -> int:
    """The longer side of a picture on a page over that many photos, in pixels."""
    return next((side for most, side in _SIDES if photos <= most), _LAST_SIDE)


def shows_heads(side: int) -> bool:
    """Whether a page with pictures of that side holds every head's scores. Over the most photos it does not: they are in heads.npy."""
    return side > _LAST_SIDE


def thumbnail(picture: Image.Image, side: int) -> str:
    """A picture for the page, as a data URI. Small pictures are scaled up, so that patches stay crisp."""
    shown = panel(picture) if max(picture.size) < SMALLEST else picture.copy()
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    shown.save(stream, "WEBP", quality=82, method=3)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def render(facts: RunFacts, photos: Sequence[PhotoRecord], failed: Sequence[Failure], speed: Speed | None) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    ratios = [photo.keep_ratio for photo in photos]
    summary: dict[str, Any] = {
        "macs_share": sum(photo.macs_share for photo in photos) / len(photos),
        "dense_macs": photos[0].explanation.trace.dense_macs,
        "keep": [sum(column) / len(photos) for column in zip(*ratios, strict=True)],
        "speed": speed,
        "patches": photos[0].explanation.trace.keep_GBN.shape[-1],
    }
    has_heads = all(photo.embedded["numbers"]["heads"] for photo in photos)
    script = {"heads": has_heads, "shared": viewer.shared(photos), "about": viewer.about}
    look = {"gradient": css_gradient(), "map": NAME, "pale": "rgb({} {} {})".format(*PALE), "heat": HEAT}
    template = environment.get_template("page.html.j2")
    return template.render(facts=facts, photos=photos, failed=failed, summary=summary, look=look, script=script, versions=versions())


def _percent(value: float) -> str:
    """A share as per cent, with a digit more where there is little."""
    return f"{100 * value:.1f}" if value < 0.0995 else f"{100 * value:.0f}"
