"""The colour map of every heatmap. It rises evenly in lightness, so the colour-blind can read it, and so can a grey printer."""

from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

NAME = "viridis"


@cache
def table() -> UInt8[np.ndarray, "256 3"]:
    """The colour map as 256 RGB colours, from score 0 to score 1."""
    from matplotlib import colormaps

    return colormaps[NAME](np.arange(256), bytes=True)[:, :3].copy()


def colour(scores: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Scores in [0, 1] -> RGB."""
    return table()[(scores.clip(0, 1) * 255).round().astype(np.uint8)]


def css_gradient(stops: int = 9) -> str:
    """The colour map as the stops of a CSS linear-gradient."""
    chosen = table()[np.linspace(0, 255, stops).round().astype(int)]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in chosen.tolist())
