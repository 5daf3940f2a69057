"""From a picture to a model's input through timm's transforms, with randomness that depends on the place alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from iared2.data.arrays import Preprocess
from iared2.seeds import seed_all


def make_transform(how: Preprocess, train: bool) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform (resize, crop), or for training a random resized crop and a flip only."""
    common: dict[str, Any] = {
        "input_size": (3, *how.size),
        "mean": how.mean,
        "std": how.std,
        "interpolation": how.interpolation,
        "color_jitter": None,
    }
    if not train:
        return create_transform(**common, crop_pct=how.crop_pct, crop_mode=how.crop_mode)
    return create_transform(**common, is_training=True, scale=(how.min_scale, 1.0), hflip=0.5 if how.flip else 0.0)


@contextmanager
def seeded(*parts: int, active: bool = True) -> Iterator[None]:
    """Seeds every generator for a `with` block and puts back the host's states afterwards."""
    if not active:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what transforms draw from
    try:
        seed_all(*parts)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
