"""Explainers by name. A stand-in with the trivial maps and our own until all methods are here."""

import difflib

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.errors import ConfigError
from iared2.explain.ours import interpreter_maps
from iared2.model import ReducedTransformer
from iared2.seeds import generator


class Explainer:
    """From images to maps; `forwards` is the cost per image in forward passes."""

    forwards: float = 0.0
    slow: bool = False

    def __init__(self, name: str, model: ReducedTransformer, seed: int) -> None:
        self.name, self.model, self.draw = name, model, generator(seed)
        self.forwards = 1.0 if name == "ours" else 0.0

    def __call__(self, images: Float[Tensor, "B C height width"], target: Tensor | None = None) -> Float[Tensor, "B h w"]:
        grid = self.model.adapter.grid(images.shape[-2], images.shape[-1])
        if self.name == "ours":
            return interpreter_maps(self.model, images, target).mean(1)
        if self.name == "random":
            return torch.rand(len(images), *grid, generator=self.draw)
        if self.name == "background":
            return torch.zeros(len(images), *grid)
        y, x = ((torch.arange(side) + 0.5) / side - 0.5 for side in grid)
        return torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.25**2)).expand(len(images), *grid)


def method_names() -> list[str]:
    """All names that `find_explainer` knows."""
    return ["background", "gaussian", "ours", "random"]


def find_explainer(name: str, model: ReducedTransformer, seed: int = 0) -> Explainer:
    """The explainer of that name.

    Raises:
        ConfigError: no such method; the message names the nearest one.
    """
    if name not in method_names():
        near = difflib.get_close_matches(name, method_names(), n=1)
        raise ConfigError(f"method {name!r}: no such method; known: {', '.join(near or method_names())}")
    return Explainer(name, model, seed)
