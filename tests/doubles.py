"""Explainers whose maps are known, and pictures whose objects are: what tests of `segment`, `faithfulness` and `reproduce` share."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from iared2.errors import ConfigError


class Methods:
    """Explainers that count what they are asked for, and can stop like a killed process."""

    def __init__(self, stop_after=math.inf):
        self.calls, self.targets, self.stop_after = [], [], stop_after

    def find(self, name, model, seed):
        if name == "unfit":
            raise ConfigError("method 'unfit': this model has no class token; use another")
        return Method(self, name, model, seed)


class Method:
    """nan, crash, bright (the picture's own brightness), weights (a part of the model's weights), slow...; others draw at random."""

    def __init__(self, methods, name, model, seed):
        self.methods, self.name, self.model, self.slow, self.forwards = methods, name, model, name.startswith("slow"), 2.0
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, images, target=None):
        if len(self.methods.calls) >= self.methods.stop_after:
            raise KeyboardInterrupt
        self.methods.calls.append((self.name, len(images)))
        self.methods.targets.append(target)
        if self.name == "nan":
            return torch.full((len(images), 8, 8), math.nan)
        if self.name == "crash":
            raise RuntimeError("out of luck\nand more")
        if self.name == "bright":
            return images.mean(1)
        if self.name == "weights":
            seen = self.model.backbone.blocks[-1].mlp.fc1.weight[:64, 0].detach().view(8, 8)
            return seen.expand(len(images), -1, -1)
        return torch.rand(len(images), 8, 8, generator=self.draw)


def save(path, pixels, mode=None):
    """A picture from an array, its folder made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels), mode).save(path)


def masked_folder(path: Path) -> Path:
    """Six pictures of 40x30 with a bright box each; masks of another size; a band to ignore in the first."""
    draw = np.random.default_rng(0)
    for number in range(6):
        pixels = draw.integers(0, 90, (30, 40, 3), np.uint8)
        pixels[8:20, 5 + number : 20 + number] += 150
        mask = np.zeros((60, 80), np.uint8)
        mask[16:40, 10 + 2 * number : 40 + 2 * number] = 255
        save(path / f"images/{number}.png", pixels)
        save(path / f"masks/{number}.png", mask)
    save(path / "ignore/0.png", np.full((60, 80), 255, np.uint8) * (np.arange(80) < 40).astype(np.uint8))
    return path


def labelled_folder(path: Path) -> Path:
    """Four pictures in two class folders."""
    draw = np.random.default_rng(0)
    for number in range(4):
        save(path / f"c{number % 2}/{number}.png", draw.integers(0, 255, (70, 80, 3), np.uint8))
    return path
