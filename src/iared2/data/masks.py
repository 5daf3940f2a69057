"""Pictures with object masks: a folder of them, ImageNet-Segmentation's one file, or Tiny-ImageNet's boxes as masks.

| source | what it is |
|---|---|
| folder | `images/` and `masks/`, and where there is a band to leave out `ignore/`, with equal stems |
| x.mat | `gtsegs_ijcv.mat` of ImageNet-Segmentation (Guillaumin et al. 2014), see `iared2.data.gtsegs` |
| Tiny-ImageNet | the validation pictures, each pixel of the box counting as object |

As the segmentation protocol wants it (Chefer et al. 2021), pictures are squeezed to the model's input with bilinear filtering, masks to the
same size by nearest neighbour, whatever size either has.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from iared2.data.arrays import ImageArrays
from iared2.data.cluster import stamp
from iared2.data.images import BROKEN, note_broken, read_rgb, reason
from iared2.data.pictures import SUFFIXES
from iared2.data.tiny_imagenet import is_tiny_imagenet, load_tiny_imagenet
from iared2.errors import DataError
from iared2.seeds import generator

logger = logging.getLogger("iared2.data")

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Masked:
    """One picture as it is in the files.

    Attributes:
        image: in RGB.
        mask: (height, width) bool, true on the object; any size, it is squeezed like the picture.
        ignore: (height, width) bool, true where nothing counts; None: everything counts.
    """

    image: Image.Image
    mask: np.ndarray
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class MaskedBatch:
    """Pictures of one size with their masks.

    Attributes:
        pixels_BHW3: uint8, channels last.
        mask_BHW, ignore_BHW: true on the object; true where nothing counts.
        names: one per picture, in the same order.
    """

    pixels_BHW3: UInt8[Tensor, "B H W 3"]
    mask_BHW: Bool[Tensor, "B H W"]
    ignore_BHW: Bool[Tensor, "B H W"]
    names: tuple[str, ...]


MaskOpener = Callable[[int], Image.Image | np.ndarray | None]


@dataclass(frozen=True)
class MaskedImages:
    """n pictures with masks, decoded when asked for.

    Attributes:
        open_image, open_mask, open_ignore: index -> a picture; a mask as picture or array; the pixels to leave out, or None.
        names: one name per picture.
        stamps: per picture what tells a changed file from the one before (name, size, time).
        skipped: name -> reason of every picture found broken so far, shared by all selections.
    """

    open_image: Callable[[int], Image.Image] = field(repr=False)
    open_mask: MaskOpener = field(repr=False)
    open_ignore: MaskOpener = field(repr=False)
    names: Sequence[str] = field(repr=False)
    stamps: Sequence[object] = field(repr=False)
    skipped: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Masked:
        """One picture with its mask.

        Raises:
            DataError: it, its mask or its ignore band cannot be read.
        """
        try:
            mask, ignore = self.open_mask(index), self.open_ignore(index)
            if mask is None:
                raise DataError("there is no mask")  # named below, like all other trouble
            return Masked(self.open_image(index), foreground(mask), None if ignore is None else foreground(ignore))
        except BROKEN as error:
            raise DataError(f"{self.names[index]}: {reason(error)}") from error

    def read_mask(self, index: int, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """The object's pixels that count, at `size` = (height, width), without decoding the picture.

        Raises:
            DataError: the mask or its ignore band cannot be read.
        """
        try:
            mask, ignore = self.open_mask(index), self.open_ignore(index)
            kept = squeeze(foreground(mask if mask is not None else np.zeros((1, 1), bool)), size)
            return kept if ignore is None else kept & ~squeeze(foreground(ignore), size)
        except BROKEN as error:
            raise DataError(f"{self.names[index]}: {reason(error)}") from error

    def batch(self, rows: Sequence[int], size: tuple[int, int], workers: int = 0) -> MaskedBatch | None:
        """The readable pictures of `rows` at `size` = (height, width); None if there is none. Broken ones are noted in `skipped`.

        Args:
            workers: threads that decode.
        """
        with ThreadPoolExecutor(max(1, workers)) as pool:
            found = [one for one in pool.map(partial(self._squeezed, size=size), rows) if one is not None]
        if not found:
            return None
        names, pixels, masks, ignores = zip(*found, strict=True)
        stacked = [torch.from_numpy(np.stack(parts)) for parts in (pixels, masks, ignores)]
        return MaskedBatch(stacked[0], stacked[1], stacked[2], tuple(names))

    def _squeezed(self, row: int, size: tuple[int, int]) -> tuple[str, np.ndarray, np.ndarray, np.ndarray] | None:
        try:
            one = self.open(row)
        except DataError as error:
            note_broken(self.skipped, self.names[row], str(error).removeprefix(f"{self.names[row]}: "))
            return None
        pixels = np.array(one.image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        ignore = np.zeros(size, bool) if one.ignore is None else squeeze(one.ignore, size)
        return self.names[row], pixels, squeeze(one.mask, size), ignore

    def select(self, rows: Sequence[int]) -> "MaskedImages":
        """The pictures at `rows`, in that order."""
        rows = list(rows)
        return replace(
            self,
            open_image=partial(_row, self.open_image, rows),
            open_mask=partial(_row, self.open_mask, rows),
            open_ignore=partial(_row, self.open_ignore, rows),
            names=[self.names[row] for row in rows],
            stamps=[self.stamps[row] for row in rows],
        )

    def subset(self, count: int, seed: int) -> "MaskedImages":
        """A fixed random subset of `count` pictures (all of them if there are fewer)."""
        if count >= len(self):
            return self
        return self.select(torch.randperm(len(self), generator=generator(seed))[:count].sort().values.tolist())

    def require_foreground(self, size: tuple[int, int]) -> None:
        """Stops at the first mask with an object pixel that counts.

        Raises:
            DataError: there is none, so that no figure would mean anything.
        """
        for row in range(len(self)):
            try:
                if self.read_mask(row, size).any():
                    return
            except DataError:  # a broken mask is told of when its picture's turn comes
                continue
        raise DataError(
            f"masks: all {len(self)} are empty (no pixel above half of white that `ignore/` leaves in), so there is nothing to find; "
            "wanted masks that are white on the object; transparency does not count"
        )


def _row(opener: Callable[[int], Any], rows: list[int], index: int) -> Any:
    return opener(rows[index])


def squeeze(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """A mask at `size` = (height, width), by nearest neighbour."""
    if mask.shape == size:
        return mask
    return np.array(Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)).astype(bool)


def foreground(mask: Image.Image | np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Where a mask is above half of white; of several channels the brightest counts, transparency does not.

    White is the largest value that the numbers can mean: 1 if none is above 1 (so files of 0 and 1 work), 255, or 65535.

    Raises:
        ValueError: it is no picture of one plane.
    """
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L", "I", "F") and not mask.mode.startswith("I;16"):
            mask = mask.convert("RGB")  # palettes become colours, transparency goes
        mask = np.asarray(mask)
    values = mask.max(-1) if mask.ndim == 3 else mask
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a mask of shape {mask.shape}, wanted height x width")
    if values.dtype == bool:
        return values
    peak = values.max()
    white = 1 if peak <= 1 else 255 if peak <= 255 else 65535
    return values > white / 2


# ---- opening --------------------------------------------------------------------------------------------------


def open_masks(source: Path) -> MaskedImages:
    """Opens pictures with masks, as in the table above.

    Raises:
        DataError: nothing there, nothing in it, pictures without a mask, or h5py is missing.
    """
    if source.is_file() and source.suffix.lower() == ".mat":
        from iared2.data.gtsegs import open_gtsegs

        return open_gtsegs(source)
    if not source.is_dir():
        state = "not a .mat file" if source.exists() else "no such folder or file"
        raise DataError(f"{source}: {state}; wanted a folder with images/ and masks/, gtsegs_ijcv.mat, or Tiny-ImageNet")
    if is_tiny_imagenet(source):
        arrays = load_tiny_imagenet(source, "val")
        files = [stamp(path) for path in (source / "val_annotations.txt", *sorted((source / "val").glob("*.avif")))]
        return replace(box_masks(arrays), stamps=[(files, name) for name in arrays.names])
    return _open_folder(source)


def box_masks(arrays: ImageArrays) -> MaskedImages:
    """Pictures with boxes, every pixel of the box (edges included) counting as object.

    Raises:
        DataError: they have no boxes.
    """
    if arrays.boxes is None:
        raise DataError("boxes: these pictures have none; the validation part of a Tiny-ImageNet folder has")
    names = list(arrays.names) or [str(row) for row in range(len(arrays))]
    return MaskedImages(partial(_array_image, arrays), partial(_box, arrays), _nothing, names, names)


def _array_image(arrays: ImageArrays, index: int) -> Image.Image:
    return Image.fromarray(arrays.pixels[index].numpy())


def _box(arrays: ImageArrays, index: int) -> np.ndarray:
    x0, y0, x1, y1 = arrays.boxes[index].tolist()  # type: ignore[index]  # box_masks has looked
    mask = np.zeros(tuple(arrays.pixels.shape[1:3]), bool)
    mask[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1] = True
    return mask


def _nothing(index: int) -> None:
    del index


def _open_folder(folder: Path) -> MaskedImages:
    images, masks = (_by_stem(folder, name) for name in ("images", "masks"))
    ignores = _by_stem(folder, "ignore") if (folder / "ignore").is_dir() else {}
    missing = [path.name for stem, path in images.items() if stem not in masks]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise DataError(
            f"{folder}: {len(missing)} of {len(images)} pictures have no mask: {shown}; wanted masks/STEM.png (or another picture format) "
            "for each, or take these pictures out of images/"
        )
    if ignores and len(ignores.keys() & images.keys()) < len(images):
        logger.debug("%s: %d pictures have no file in ignore/: all of their pixels count", folder, len(images.keys() - ignores.keys()))
    files = [(path, masks[stem], ignores.get(stem)) for stem, path in images.items()]
    stamps = [tuple(stamp(path) for path in three if path is not None) for three in files]
    openers = (partial(_open_rgb, files), partial(_open_plane, files, 1), partial(_open_plane, files, 2))
    return MaskedImages(*openers, [str(path.relative_to(folder)) for path in images.values()], stamps)


def _by_stem(folder: Path, name: str) -> dict[str, Path]:
    """The pictures of one of the folders by stem, in order."""
    inside = folder / name
    if not inside.is_dir():
        raise DataError(f"{folder}: no folder {name}/ in it; wanted images/ and masks/ (and ignore/) with equal stems")
    found: dict[str, Path] = {}
    try:
        paths = sorted(path for path in inside.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{inside}: cannot be read ({error.strerror or error})") from None
    for path in paths:
        if path.stem in found:
            raise DataError(f"{inside}: {found[path.stem].name} and {path.name} have the same stem; keep one of them")
        found[path.stem] = path
    if not found:
        raise DataError(f"{inside}: no pictures in it (looked for jpg, png, gif, webp, tiff, bmp, avif, ...)")
    return found


Files = list[tuple[Path, Path, Path | None]]


def _open_rgb(files: Files, index: int) -> Image.Image:
    return read_rgb(files[index][0].open("rb"))


def _open_plane(files: Files, which: int, index: int) -> Image.Image | None:
    path = files[index][which]
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except BROKEN as error:
        raise DataError(f"{path.parent.name}/{path.name}: {reason(error)}") from None
