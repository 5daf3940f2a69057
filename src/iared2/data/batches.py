"""Batches over pictures that are decoded on the way, the same whatever the number of workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iared2.data.arrays import ArrayBatches, ImageArrays, Preprocess, ReadBatches, epoch_order
from iared2.data.images import LabelledImages, first_reason
from iared2.data.streams import StreamBatches, StreamedImages
from iared2.data.views import make_transform, seeded
from iared2.errors import DataError
from iared2.seeds import generator


@dataclass(frozen=True)
class Broken:
    """What a worker hands on in place of a picture that it could not read."""

    index: int
    why: str


@dataclass(frozen=True)
class Views(Dataset):
    """Pictures of one epoch by index. `key` seeds the augmentation together with the index; None draws nothing."""

    images: LabelledImages
    transform: Callable[[Image.Image], Tensor]
    key: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | Broken:
        try:
            image = self.images.open(index)
        except DataError as error:
            return Broken(index, str(error).removeprefix(f"{self.images.name(index)}: "))
        with seeded(*(self.key or ()), index, active=self.key is not None):
            return self.transform(image), self.images.label(index), index


def collate(samples: Sequence[tuple[Tensor, int, int] | Broken]) -> tuple[dict[str, Tensor] | None, list[Broken]]:
    """A batch of the readable pictures (None if there is none), and the broken ones."""
    good = [sample for sample in samples if not isinstance(sample, Broken)]
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    if not good:
        return None, broken
    views, labels, indices = zip(*good, strict=True)
    return {"images": torch.stack(views), "labels": torch.tensor(labels), "indices": torch.tensor(indices)}, broken


@dataclass(frozen=True)
class FileBatches(ReadBatches[LabelledImages]):
    """Batches over `LabelledImages`, with the protocol of `ArrayBatches`.

    A batch is a pure function of (seed, epoch, step, rank): `workers` changes the speed alone, and a resumed
    run sees what the undisturbed one saw. Broken pictures are left out and listed in `skipped`. A batch
    without any readable picture is left out in evaluation; in training the next readable batch takes its
    place, so that every rank takes as many steps as announced.
    """

    workers: int = 0

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch for one rank, from step `start` on."""
        order = epoch_order(self.examples, self.seed, epoch, self.train)
        per_step, steps = self.batch_size * world, self.steps(world)
        plan = [order[step * per_step : (step + 1) * per_step][rank::world].tolist() for step in range(steps)]
        views = Views(self.images, make_transform(self.how, self.train), (self.seed, epoch) if self.train else None)
        loader = DataLoader(
            views, batch_sampler=plan[start:], num_workers=self.workers, collate_fn=collate, generator=generator(self.seed, epoch, rank)
        )
        for step, (batch, broken) in enumerate(loader, start):
            for entry in broken:
                self.images.skip(entry.index, entry.why)
            found = batch if batch is not None or not self.train else self._next_readable(views, plan, step)
            if found is not None:
                yield found

    def _next_readable(self, views: Views, plan: list[list[int]], step: int) -> dict[str, Tensor]:
        for other in plan[step + 1 :] + plan[:step]:
            batch, _ = collate([views[index] for index in other])
            if batch is not None:
                return batch
        raise DataError(f"none of the {self.examples} pictures can be read; the first: {first_reason(self.skipped)}")


def make_batches(
    data: LabelledImages | StreamedImages | ImageArrays,
    how: Preprocess,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    workers: int = 0,
) -> FileBatches | StreamBatches | ArrayBatches:
    """Batches over whatever `open_data` gave."""
    if isinstance(data, ImageArrays):
        return ArrayBatches(data, how, batch_size, seed, train)
    if isinstance(data, StreamedImages):
        return StreamBatches(data, how, batch_size, seed, train)
    return FileBatches(data, how, batch_size, seed, train, workers)


@dataclass(frozen=True)
class _Squeeze:
    """A picture -> uint8 pixels of one size: by centre crop, or by squeezing the whole of it."""

    size: tuple[int, int]
    crop: bool

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "h w 3"]:
        height, width = self.size
        how = Image.Resampling.BICUBIC
        image = ImageOps.fit(image, (width, height), how) if self.crop else image.resize((width, height), how)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)


def to_arrays(images: LabelledImages, size: tuple[int, int], crop: bool = True, workers: int = 0) -> ImageArrays:
    """Decodes every picture once into memory; broken ones are left out and listed in `images.skipped`.

    Worth it where pictures are few and epochs many: on two cores decoding takes longer than a small model.

    Args:
        size: height and width of the stored pixels.
        crop: cut the middle out in this aspect ratio; otherwise the whole picture is squeezed.

    Raises:
        DataError: no picture can be read.
    """
    plan = [list(range(first, min(first + 32, len(images)))) for first in range(0, len(images), 32)]
    views = Views(images, _Squeeze(size, crop))
    loader = DataLoader(views, batch_sampler=plan, num_workers=workers, collate_fn=collate, generator=generator(0))
    console = Console(stderr=True)
    pixels = torch.empty(len(images), *size, 3, dtype=torch.uint8)
    kept: list[int] = []
    for batch, broken in track(loader, "decoding", total=len(plan), console=console, disable=not console.is_terminal):
        for entry in broken:
            images.skip(entry.index, entry.why)
        if batch is not None:
            pixels[len(kept) : len(kept) + len(batch["labels"])] = batch["images"]
            kept += batch["indices"].tolist()
    if not kept:
        raise DataError(f"none of the {len(images)} pictures can be read; the first: {first_reason(images.skipped)}")
    names = [images.name(index) for index in kept]
    return ImageArrays(pixels=pixels[: len(kept)], labels=images.labels[kept], names=names, class_ids=images.class_ids)
