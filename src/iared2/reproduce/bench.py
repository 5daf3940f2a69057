"""What all reproductions stand on: where the pictures come from, how many there are, and the recipe that the paper's tables vary."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from iared2 import assets
from iared2.data.arrays import ImageArrays, Preprocess
from iared2.data.batches import make_batches
from iared2.data.labels import model_class_ids
from iared2.data.sources import Data, open_data
from iared2.data.streams import StreamedImages
from iared2.data.tiny_imagenet import is_tiny_imagenet
from iared2.errors import ConfigError, DataError, WeightsError
from iared2.output import open_folder, write
from iared2.runtime import from_main
from iared2.saving import embedded_weights, sha256
from iared2.train.feeds import Feeds
from iared2.train.recipes import Recipe, find_recipe
from iared2.train.run import build_backbone

logger = logging.getLogger("iared2.reproduce")

Scale = Literal["small", "paper"]
Start = Literal["imitation", "nothing"]
BUDGET = 0.69  # share of the dense multiply-adds: what dropping 30 % at the input leaves, and nearly the paper's 2.9 of 4.2 G
# Shares of patches that imitation leaves, by number of groups, all for about that budget.
RATIOS = {2: (0.9, 0.46), 3: (0.95, 0.65, 0.45), 4: (0.97, 0.77, 0.56, 0.42)}

# What the small scale changes in `mini_reduced`. Reward and blocks learn from labels, and dropped patches are gone, as in the paper.
# Interpreters start as class attention, imitate for a quarter of an epoch and take larger steps, because one epoch is so short here.
_SMALL = {
    "reduction.reward.target": "label",
    "reduction.reward.soft": False,
    "reduction.block_target": "label",
    "reduction.on_drop": "discard",
    "reduction.interpreter.start": "attention",
    "reduction.warm_start_epochs": 0.25,
    "reduction.warm_start_optim.lr": 1e-4,
    "reduction.interpreter_optim.lr": 1e-3,
    "log_every": 1_000_000,
    "checkpoint_every": 1_000_000,
}
# The paper's own start: random weights and no imitation. Steps are larger still, so that one epoch gets somewhere.
_NOTHING = {"reduction.warm_start_epochs": 0, "reduction.interpreter.start": "small", "reduction.interpreter_optim.lr": 2e-3}


@dataclass(frozen=True)
class Bench:
    """One place for all runs of a reproduction.

    Attributes:
        images: training pictures, a fixed random subset (small scale).
        val_images: validation pictures, likewise; None takes all.
        seeds: seeds 0 to seeds - 1.
        weights: of the embedded model's backbone, where another than the present one is wanted (small scale).
    """

    data: Path
    output: Path
    scale: Scale = "small"
    images: int = 5000
    val_images: int | None = None
    seeds: int = 1
    weights: Path | None = None
    device: str = "auto"
    workers: int = 0

    def check(self) -> None:
        """Refuses what cannot be done here, before anything is done, and opens the output folder.

        Raises:
            ConfigError: numbers below 1, or the paper's scale without its data or a GPU.
            DataError: the small scale without Tiny-ImageNet-200, or an output folder that cannot be written to.
        """
        for name, value in (("images", self.images), ("val-images", self.val_images), ("seeds", self.seeds)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: got {value}, wanted 1 or more")
        if self.scale == "small" and not is_tiny_imagenet(self.data):
            raise DataError(
                f"--data: got {self.data}, but --scale small expects Tiny-ImageNet-200 (wnids.txt, train/, val/); name its folder"
            )
        if self.weights is not None and self.scale == "paper":
            raise ConfigError("--weights: the paper's scale starts from the hub's weights; leave it out, or take --scale small")
        if self.weights is not None and not self.weights.is_file():
            raise WeightsError(f"--weights: {self.weights}: no such weights file")
        if self.scale == "paper":
            self._check_the_papers()
        open_folder(self.output)

    def _check_the_papers(self) -> None:
        lacks = [] if torch.cuda.is_available() else ["no CUDA device"]
        lacks += [f"no {part}/ in {self.data}" for part in ("train", "val") if not (self.data / part).is_dir()]
        if lacks or is_tiny_imagenet(self.data):
            raise ConfigError(
                f"--scale paper expects ImageNet-1k (train/ and val/, one folder per class) and CUDA GPUs (the paper: 4.5 hours on 24 V100 "
                f"per curriculum); got {', '.join(lacks) or 'Tiny-ImageNet-200'}; take --scale small on other machines"
            )

    def recipe(self, changes: Mapping[str, Any], seed: int, base: bool = False, start: Start = "imitation") -> Recipe:
        """The recipe of this scale with changes.

        Args:
            changes: dotted paths of fields and their values.
            base: DeiT-B instead of DeiT-S at the paper's scale (Table 7).
            start: how interpreters begin at the small scale; at the paper's always from nothing.
        """
        values: dict[str, Any] = {"seed": seed, "data.train": str(self.data.absolute())}  # a run is the same from every folder
        if self.scale == "small":
            values |= {**_SMALL, "data.subset": self.images, "backbone.weights": str(self._start())}
            values |= _NOTHING if start == "nothing" else {}
        name = "mini_reduced" if self.scale == "small" else f"paper_deit_{'base' if base else 'small'}"
        merged = {**values, **changes}
        if self.scale == "small":
            merged["reduction.warm_start_ratios"] = RATIOS[merged.get("reduction.groups", 3)]
        return find_recipe(name, [f"{path}={json.dumps(value)}" for path, value in merged.items()])

    def _start(self) -> Path | None:
        """The weights that the small scale starts from."""
        return embedded_weights(assets.DEFAULT) if self.weights is None else self.weights.absolute()

    @cached_property
    def start_hash(self) -> str | None:
        """What these weights are: the file that has them may hold others one day. None at the paper's scale."""
        start = self._start() if self.scale == "small" else None
        return None if start is None else sha256(start)

    @cached_property
    def classes(self) -> list[str] | None:
        """The class ids of the backbone in label order, where they are known."""
        return model_class_ids(build_backbone(self.recipe({}, 0)))

    @cached_property
    def pictures(self) -> tuple[Data, Data]:
        """Training and validation pictures. Tiny-ImageNet takes half a minute to read, so the small scale keeps its subset in OUT."""
        if self.scale == "paper":
            return open_data(self.data, "train", self.classes), self._validation(open_data(self.data, "val", self.classes))
        path = self.output / f"pictures-{self.images}-{self.val_images or 'all'}.safetensors"
        from_main(partial(self._gather, path))
        found = _read(path)
        if found is None:
            raise DataError(f"{path}: cannot be read, though it was just written; look at the disk, or name another --output")
        return found

    def _gather(self, path: Path) -> None:
        """Writes the small scale's pictures, unless they are there."""
        if _read(path) is not None:
            return
        train, val = open_data(self.data, "train", self.classes), open_data(self.data, "val", self.classes)
        if not isinstance(train, ImageArrays) or not isinstance(val, ImageArrays):
            raise DataError(f"{self.data}: wanted Tiny-ImageNet-200 as pictures of one size; name its folder")
        _write(path, (train.subset(self.images, 0), val if self.val_images is None else val.subset(self.val_images, 0)))

    def _validation(self, data: Data) -> Data:
        return data if self.val_images is None or isinstance(data, StreamedImages) else data.subset(self.val_images, 0)

    def feeds(self, recipe: Recipe, backbone: nn.Module) -> Feeds:
        """Batches to train on, in the order that the recipe's seed gives."""
        return Feeds(
            make_batches(self.pictures[0], self.how(recipe, backbone), recipe.data.batch_size, recipe.seed, workers=self.workers), None
        )

    def held_out(self, recipe: Recipe, backbone: nn.Module, batch_size: int = 50) -> Any:
        """Batches to measure on."""
        return make_batches(self.pictures[1], self.how(recipe, backbone), batch_size, 0, train=False, workers=self.workers)

    def how(self, recipe: Recipe, backbone: nn.Module) -> Preprocess:
        """How the backbone wants its pictures, and how training varies them."""
        found = timm.data.resolve_model_data_config(backbone)
        return Preprocess.from_timm(found, min_scale=recipe.data.min_scale, flip=recipe.data.flip)


def _write(path: Path, pair: tuple[ImageArrays, ImageArrays]) -> None:
    tensors = {
        f"{name}.{part}": getattr(one, part) for name, one in zip(("train", "val"), pair, strict=True) for part in ("pixels", "labels")
    }
    if pair[1].boxes is not None:
        tensors["val.boxes"] = pair[1].boxes
    write(path, save({name: value.contiguous() for name, value in tensors.items()}))


def _read(path: Path) -> tuple[ImageArrays, ImageArrays] | None:
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        train = ImageArrays(found["train.pixels"], found["train.labels"])
        return train, ImageArrays(found["val.pixels"], found["val.labels"], boxes=found.get("val.boxes"))
    except (SafetensorError, KeyError):
        logger.warning("%s cannot be read; it is made again", path)
        return None
