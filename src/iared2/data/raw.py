"""Labelled pictures in the view of evaluation, before normalisation: what may be changed pixel by pixel and then shown to a model."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from iared2.data.arrays import ImageArrays, Preprocess, plain_batch
from iared2.data.cluster import stamp, weights_of
from iared2.data.images import LabelledImages
from iared2.data.sources import Data
from iared2.data.streams import StreamedImages
from iared2.data.views import make_transform
from iared2.errors import DataError
from iared2.seeds import generator


@dataclass(frozen=True)
class RawBatch:
    """Pictures of one size.

    Attributes:
        image_BCHW: pixels in [0, 1].
        label_B: their classes.
    """

    image_BCHW: Float[Tensor, "B C H W"]
    label_B: Int[Tensor, " B"]


@dataclass(frozen=True)
class RawImages:
    """n labelled pictures, resized and cropped when asked for.

    Attributes:
        data: where they come from.
        names: one name per picture.
        stamps: per picture what tells a changed file from the one before, and its label.
        skipped: name -> reason of every picture found broken so far.
    """

    data: LabelledImages | ImageArrays = field(repr=False)
    names: Sequence[str] = field(repr=False)
    stamps: Sequence[object] = field(repr=False)

    @property
    def skipped(self) -> dict[str, str]:
        return {} if isinstance(self.data, ImageArrays) else self.data.skipped

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Sequence[int]) -> "RawImages":
        """The pictures at `rows`, in that order."""
        rows = list(rows)
        return RawImages(self.data.select(rows), [self.names[row] for row in rows], [self.stamps[row] for row in rows])

    def subset(self, count: int, seed: int) -> "RawImages":
        """A fixed random subset of `count` pictures (all of them if there are fewer), the one that `eval --limit` takes."""
        if count >= len(self):
            return self
        return self.select(torch.randperm(len(self), generator=generator(seed))[:count].sort().values.tolist())

    def batch(self, rows: Sequence[int], how: Preprocess, workers: int = 0) -> RawBatch | None:
        """The readable pictures of `rows`; None if there is none. Broken ones are noted in `skipped`.

        Args:
            how: size and crop; its mean and deviation are left out.
            workers: threads that decode.
        """
        how, part = replace(how, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), self.data
        if isinstance(part, ImageArrays):
            chosen = part.select(rows)
            return RawBatch(plain_batch(chosen.pixels, how).clamp(0, 1), chosen.labels)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            views = list(pool.map(partial(_view, part, make_transform(how, train=False)), rows))
        kept = [(view, row) for view, row in zip(views, rows, strict=True) if view is not None]
        if not kept:
            return None
        return RawBatch(torch.stack([view for view, _ in kept]).clamp(0, 1), part.labels[[row for _, row in kept]])


def _view(data: LabelledImages, transform: Callable[[Image.Image], Tensor], row: int) -> Tensor | None:
    try:
        return transform(data.open(row))
    except DataError as error:
        data.skip(row, str(error).removeprefix(f"{data.names[row]}: "))
        return None


def raw_images(data: Data, source: Path) -> RawImages:
    """What `open_data` gave for `source`, as raw pictures.

    Raises:
        DataError: a stream, which cannot be opened by number, or no pictures.
    """
    if isinstance(data, StreamedImages):
        raise DataError(f"{source}: a stream cannot be sampled; give a folder or an archive of pictures")
    if not len(data):
        raise DataError(f"{source}: there are no pictures in it")
    labels = data.labels.tolist()
    names = list(data.names) or [str(row) for row in range(len(labels))]
    if isinstance(data, ImageArrays):
        pixels = weights_of({"pixels": data.pixels})
        return RawImages(data, names, [(pixels, name, label) for name, label in zip(names, labels, strict=True)])
    folder = source if source.is_dir() else source.parent
    files = [folder / name for name in names]
    own = stamp(source)
    return RawImages(data, names, [(own, stamp(file), label) for file, label in zip(files, labels, strict=True)])
