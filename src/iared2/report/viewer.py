"""The numbers behind the page: scores, heads, carriers and maps of a photo, packed so that they weigh little beside its pictures."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from iared2.explain import Explanation
from iared2.report.colours import table
from iared2.report.pictures import FADE, HEAT, PALE, stretched
from iared2.report.records import PhotoRecord

TOP = 65535  # the integer that stands for 1; among carriers, for a patch that is gone


def packed(values: np.ndarray) -> str:
    """Values in [0, 1] as 16-bit integers (little-endian), in base64."""
    return _text((np.asarray(values, np.float64).clip(0, 1) * TOP).round().astype("<u2"))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def numbers(explanation: Explanation, maps: Mapping[str, Float[np.ndarray, "_h _w"]], heads: bool) -> dict[str, Any]:
    """What the page's script needs to know of one photo's patches.

    Args:
        maps: by method, one value per patch or per pixel.
        heads: whether to hold every head's score, too.

    Returns:
        scores (G, N), heads (G, H, N) or None, carriers (G, N), and for each method its name, its map on the patch grid stretched to
        [0, 1], the values that 0 and 1 stand for, and whether it had a value per pixel.
    """
    trace, head_GHN = explanation.trace, explanation.head_GHN
    carriers = trace.carrier_GBN[:, 0].numpy()
    return {
        "scores": packed(trace.score_GBN[:, 0].float().numpy()),
        "heads": packed(head_GHN.numpy()) if heads and head_GHN is not None else None,
        "carriers": _text(np.where(carriers < 0, TOP, carriers).astype("<u2")),
        "methods": [_method(name, values, trace.grid) for name, values in maps.items()],
    }


def _method(name: str, values: Float[np.ndarray, "_h _w"], grid: Sequence[int]) -> dict[str, Any]:
    """A map with a value per pixel is shown as means over patches: the page is about patches, and the sheet has every pixel."""
    fine, (rows, columns) = values.shape != tuple(grid), grid
    small = F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(values))[None], (rows, columns))[0].numpy() if fine else values
    return {"name": name, "values": packed(stretched(small)), "low": float(small.min()), "high": float(small.max()), "fine": fine}


def about(photo: PhotoRecord) -> dict[str, Any]:
    """One photo for the page's script: its patches' numbers, and its figures as in the manifest."""
    entry = photo.as_json()
    figures = [{key: group[key] for key in ("kept", "keep_ratio", "macs")} for group in entry["groups"]]
    return {"name": photo.title, "groups": figures, **photo.embedded["numbers"]}


def shared(photos: Sequence[PhotoRecord]) -> dict[str, Any]:
    """What holds for all photos of a page: grid, cost of the dense backbone, colours and how the pictures use them."""
    trace = photos[0].explanation.trace
    return {
        "grid": list(trace.grid),
        "groups": trace.groups,
        "dense_macs": trace.dense_macs,
        "colours": _text(table()),
        "heat": HEAT,
        "fade": FADE,
        "pale": list(PALE),
    }
