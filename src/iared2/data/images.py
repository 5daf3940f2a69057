"""Labelled pictures behind an index, wherever they come from: a folder, an archive, a table, a hub data set."""

import logging
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from iared2.errors import DataError
from iared2.seeds import generator

logger = logging.getLogger("iared2.data")

OpenFile = Any  # a binary file; typing.IO refuses tarfile's and io.BytesIO when types are checked at run time
Opener = Callable[[int], OpenFile | Image.Image]

# What Pillow and the archives raise for damaged content; some decoders let their own errors through.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)


def read_rgb(handle: OpenFile | Image.Image) -> Image.Image:
    """Decodes a picture as RGB and closes it, as timm's data sets do (no rotation by EXIF)."""
    with closing(handle):
        image = handle if isinstance(handle, Image.Image) else Image.open(handle)
        return image.convert("RGB")


def reason(error: BaseException) -> str:
    """Why a picture could not be read, in one clause."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class LabelledImages:
    """n labelled pictures, decoded when asked for. Can be pickled, so that loader workers may share it.

    Attributes:
        opener: index -> an open binary file or a picture.
        labels: (n,) class indices.
        names: one name per picture.
        class_ids: class names in label order, where known.
        sources: one name per picture of where it comes from (the `source` column of a labels.csv).
        skipped: name -> reason of every picture found broken so far, shared by all selections.
    """

    opener: Opener = field(repr=False)
    labels: Int[Tensor, " n"]
    names: Sequence[str] = field(repr=False)
    class_ids: Sequence[str] = field(default=(), repr=False)
    sources: Sequence[str] | None = field(default=None, repr=False)
    skipped: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """The picture in RGB.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return read_rgb(self.opener(index))
        except BROKEN as error:
            raise DataError(f"{self.names[index]}: {reason(error)}") from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return self.names[index]

    def source(self, index: int) -> str | None:
        return None if self.sources is None else self.sources[index]

    def skip(self, index: int, why: str) -> None:
        """Notes a broken picture, and logs it the first time."""
        note_broken(self.skipped, self.names[index], why)

    def select(self, rows: Sequence[int]) -> "LabelledImages":
        """The pictures at `rows`, in that order."""
        rows = list(rows)
        return replace(
            self,
            opener=partial(_open_row, self.opener, rows),
            labels=self.labels[rows],
            names=[self.names[row] for row in rows],
            sources=None if self.sources is None else [self.sources[row] for row in rows],
        )

    def subset(self, count: int, seed: int) -> "LabelledImages":
        """A fixed random subset of `count` pictures (all of them if there are fewer)."""
        if count >= len(self):
            return self
        return self.select(torch.randperm(len(self), generator=generator(seed))[:count].sort().values.tolist())


def _open_row(opener: Opener, rows: list[int], index: int) -> OpenFile | Image.Image:
    return opener(rows[index])


def first_reason(skipped: dict[str, str]) -> str:
    """The first broken picture, and why it cannot be read."""
    return next((f"{name}: {why}" for name, why in skipped.items()), "")


def note_broken(skipped: dict[str, str], name: str, why: str) -> None:
    """Adds a broken picture to the list, and logs it the first time."""
    if name not in skipped:
        skipped[name] = why
        logger.warning("skipped %s: %s", name, why)
