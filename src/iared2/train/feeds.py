"""The pictures of a recipe as batches: training, and a held-out part to watch the run."""

from dataclasses import dataclass

from torch import nn

from iared2.train.recipes import Recipe
from iared2.train.trainer import Batches


@dataclass(frozen=True)
class Feeds:
    """Batches to train on, and batches to watch the run with (None if there are none)."""

    train: Batches
    held_out: Batches | None


def open_feeds(recipe: Recipe, backbone: nn.Module, workers: int) -> Feeds:
    raise NotImplementedError
