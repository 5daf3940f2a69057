"""Labelled pictures of one size held in memory as uint8, and batches made from them without decoding."""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F

from iared2.seeds import generator


@dataclass(frozen=True)
class ImageArrays:
    """n pictures of one size with labels; `targets` may carry a teacher's logits, row for row.

    Attributes:
        pixels: (n, h, w, 3) uint8.
        labels: (n,) class indices in the order of `class_ids`.
        names: one name per picture.
        class_ids: WordNet ids or folder names, in label order.
        boxes: (n, 4) ground-truth boxes x0, y0, x1, y1 in pixels (inclusive), where known.
        targets: (n, classes) logits of a teacher.
    """

    pixels: UInt8[Tensor, "n h w 3"]
    labels: Int[Tensor, " n"]
    names: Sequence[str] = field(default=(), repr=False)
    class_ids: Sequence[str] = field(default=(), repr=False)
    boxes: Int[Tensor, "n 4"] | None = None
    targets: Float[Tensor, "n classes"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rows: Sequence[int]) -> "ImageArrays":
        """The pictures at `rows`, in that order."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        return replace(
            self,
            pixels=self.pixels[chosen],
            labels=self.labels[chosen],
            names=[self.names[i] for i in chosen.tolist()] if self.names else (),
            boxes=None if self.boxes is None else self.boxes[chosen],
            targets=None if self.targets is None else self.targets[chosen],
        )

    def subset(self, count: int, seed: int) -> "ImageArrays":
        """A fixed random subset of `count` pictures (all of them if there are fewer)."""
        if count >= len(self):
            return self
        return self.select(torch.randperm(len(self), generator=generator(seed))[:count].sort().values.tolist())


@dataclass(frozen=True)
class Preprocess:
    """From uint8 pixels to what a backbone eats.

    Attributes:
        size: height and width of the model's input in pixels.
        mean, std: per channel, on the scale 0..1.
        min_scale: smallest share of the picture's area that a random training crop keeps (1 = no crop).
        flip: mirror half of the training pictures.
        crop_pct, crop_mode, interpolation: timm's, for pictures of other sizes in evaluation.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_scale: float = 0.6
    flip: bool = True
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    @classmethod
    def from_timm(cls, data: Mapping[str, Any], **changes: Any) -> "Preprocess":
        """From a data configuration as `timm.data.resolve_model_data_config` gives it."""
        values = {
            "size": tuple(data["input_size"][-2:]),
            "mean": tuple(data["mean"]),
            "std": tuple(data["std"]),
            "crop_pct": data.get("crop_pct") or 1.0,
            "crop_mode": data.get("crop_mode") or "center",
            "interpolation": data.get("interpolation") or "bicubic",
        }
        return cls(**{**values, **changes})

    @classmethod
    def of(cls, backbone: Any, **changes: Any) -> "Preprocess":
        """As timm's data configuration of a backbone says, at the size that the backbone was built for."""
        size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        built = {} if size is None else {"size": tuple(size)}
        return cls.from_timm(resolve_model_data_config(backbone), **{**built, **changes})


def normalise(pixels: UInt8[Tensor, "b h w 3"], mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels, channels last -> normalised float images, channels first."""
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    return images.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def plain_batch(pixels: UInt8[Tensor, "b h w 3"], how: Preprocess) -> Float[Tensor, "b 3 height width"]:
    """The evaluation view: the whole picture, resized (bicubic, antialiased) where the size differs."""
    images = normalise(pixels, how.mean, how.std)
    if images.shape[-2:] != how.size:
        images = F.interpolate(images, size=how.size, mode="bicubic", antialias=True)
    return images


def random_views(pixels: UInt8[Tensor, "b h w 3"], how: Preprocess, uniform_5B: Float[Tensor, "5 b"]) -> Float[Tensor, "b 3 height width"]:
    """Random resized crops and flips of a whole batch in one bilinear sampling.

    Area in [min_scale, 1], aspect ratio in [4/5, 5/4], both log-uniform or uniform as usual; the crop stays
    inside the picture.

    Args:
        uniform_5B: numbers in [0, 1) that decide area, aspect ratio, flip and place of each view.
    """
    count = len(pixels)
    area_, ratio_, flip_, x_, y_ = uniform_5B
    area = how.min_scale + (1 - how.min_scale) * area_
    ratio = torch.exp((2 * ratio_ - 1) * math.log(1.25))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    if how.min_scale >= 1:
        width, height = torch.ones(count), torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(flip_ < 0.5, -width, width) if how.flip else width
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x_ - 1)
    theta[:, 1, 2] = (1 - height) * (2 * y_ - 1)
    grid = F.affine_grid(theta, [count, 3, *how.size], align_corners=False)
    return F.grid_sample(normalise(pixels, how.mean, how.std), grid, align_corners=False, padding_mode="reflection")


def with_views(arrays: ImageArrays, count: int, min_scale: float, seed: int) -> ImageArrays:
    """Every picture, and `count` fixed random crops of each, half of them mirrored, as further pictures of their own.

    A training that caches what it computed for a picture sees more than one picture of a thing this way.
    """
    height, width = arrays.pixels.shape[1:3]
    how = Preprocess((height, width), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), min_scale)
    rows = torch.arange(len(arrays)).repeat(1 + count)
    many = arrays.select(rows.tolist())
    for start in range(len(arrays), len(rows), 100):
        part = slice(start, start + 100)
        crops = random_views(many.pixels[part], how, torch.rand(5, len(many.pixels[part]), generator=generator(seed, start)))
        many.pixels[part] = (255 * crops).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return many


def steps_per_epoch(examples: int, per_step: int, train: bool) -> int:
    """Steps of one epoch; training drops the last incomplete one (but takes at least one), evaluation keeps it."""
    return max(1, examples // per_step) if train else -(-examples // per_step)


def epoch_order(examples: int, seed: int, epoch: int, train: bool) -> Int[Tensor, " n"]:
    """The order of one epoch: shuffled by (seed, epoch) in training, as it stands in evaluation."""
    return torch.randperm(examples, generator=generator(seed, epoch)) if train else torch.arange(examples)


class Readable(Sized, Protocol):
    """Pictures that are read on the way, and why some could not be."""

    @property
    def skipped(self) -> dict[str, str]: ...


Pictures = TypeVar("Pictures", bound=Sized)
Read = TypeVar("Read", bound=Readable)


@dataclass(frozen=True)
class Paced(Generic[Pictures]):
    """What all batches have in common; `epoch` is theirs to say. `batch_size` is per rank."""

    images: Pictures
    how: Preprocess
    batch_size: int
    seed: int = 0
    train: bool = True

    @property
    def examples(self) -> int:
        return len(self.images)

    def steps(self, world: int = 1) -> int:
        """Batches per epoch and rank; training drops the last incomplete one, evaluation keeps it."""
        return steps_per_epoch(self.examples, self.batch_size * world, self.train)


@dataclass(frozen=True)
class ReadBatches(Paced[Read]):
    """What batches of pictures that are read on the way have in common."""

    @property
    def skipped(self) -> dict[str, str]:
        return self.images.skipped


@dataclass(frozen=True)
class ArrayBatches(Paced[ImageArrays]):
    """Batches over `ImageArrays`; a pure function of (seed, epoch, step), so that a resumed run sees the same.

    Each batch is a dict: `images` (B, 3, H, W), `labels` (B,), `indices` (B,), and `targets` when the arrays
    have them. Ranks read disjoint slices of the same permutation.
    """

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch for one rank, from step `start` on."""
        order = epoch_order(self.examples, self.seed, epoch, self.train)
        per_step = self.batch_size * world
        # By place in the epoch: neither the batch size nor the number of ranks changes a view.
        uniform_5N = torch.rand(self.examples, 5, generator=generator(self.seed, epoch, 1)).T if self.train else None
        for step in range(start, self.steps(world)):
            places = slice(step * per_step + rank, min((step + 1) * per_step, self.examples), world)
            yield self._batch(order[places], None if uniform_5N is None else uniform_5N[:, places])

    def _batch(self, chosen: Int[Tensor, " b"], uniform_5B: Float[Tensor, "5 b"] | None) -> dict[str, Tensor]:
        arrays = self.images
        pixels = arrays.pixels[chosen]
        images = plain_batch(pixels, self.how) if uniform_5B is None else random_views(pixels, self.how, uniform_5B)
        batch = {"images": images, "labels": arrays.labels[chosen], "indices": chosen}
        if arrays.targets is not None:
            batch["targets"] = arrays.targets[chosen].float()
        return batch
