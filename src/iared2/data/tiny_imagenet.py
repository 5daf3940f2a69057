"""Tiny-ImageNet-200 as AVIF mosaics: one picture per class (train) or per 500 images (val), read once as uint8.

Layout of the folder: `train/WNID.avif` holds the 500 images of a class, 25 columns by 20 rows, row by row;
`val/00.avif` .. `val/19.avif` hold the validation images the same way; `wnids.txt` gives the label order and
`val_annotations.txt` the file, WordNet id and box (x0, y0, x1, y1) of each validation image.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from iared2.data.arrays import ImageArrays
from iared2.errors import DataError

TILE = 64
COLUMNS = 25


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether `folder` is laid out as above (judged by its label file and first mosaics)."""
    return (folder / "wnids.txt").is_file() and (folder / "train").is_dir() and bool(list(folder.glob("*/*.avif")))


def read_mosaic(path: Path) -> UInt8[np.ndarray, "tiles 64 64 3"]:
    """Cuts one mosaic into its tiles, row by row.

    Raises:
        DataError: the file is not a mosaic of 64x64 tiles in 25 columns.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}); Pillow 11.3 or newer reads AVIF") from error
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    if columns != COLUMNS or pixels.shape[:2] != (rows * TILE, COLUMNS * TILE):
        raise DataError(f"{path}: got {pixels.shape[1]}x{pixels.shape[0]} pixels, wanted {COLUMNS} columns of {TILE}x{TILE} tiles")
    tiles = pixels.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, TILE, TILE, 3))


def load_tiny_imagenet(folder: Path, split: str) -> ImageArrays:
    """All images of a split ("train": 100,000; "val": 10,000) with labels in the order of `wnids.txt`."""
    wnids = (folder / "wnids.txt").read_text().split()
    if split == "train":
        tiles = [read_mosaic(folder / "train" / f"{wnid}.avif") for wnid in wnids]
        labels = np.repeat(np.arange(len(wnids)), [len(t) for t in tiles])
        names = [f"{wnid}_{i}" for wnid, t in zip(wnids, tiles, strict=True) for i in range(len(t))]
        boxes = None
    elif split == "val":
        rows = [line.split("\t") for line in (folder / "val_annotations.txt").read_text().splitlines() if line]
        tiles = [read_mosaic(path) for path in sorted((folder / "val").glob("*.avif"))]
        labels = np.array([wnids.index(row[1]) for row in rows])
        names = [row[0] for row in rows]
        boxes = torch.tensor([[int(v) for v in row[2:6]] for row in rows])
    else:
        raise DataError(f"split: got {split!r}, wanted 'train' or 'val'")
    pixels = torch.from_numpy(np.concatenate(tiles))
    if len(pixels) != len(labels):
        raise DataError(f"{folder}: {len(pixels)} pictures but {len(labels)} labels in the {split} split")
    return ImageArrays(pixels=pixels, labels=torch.from_numpy(labels), names=names, class_ids=wnids, boxes=boxes)


def class_words(folder: Path) -> dict[str, str]:
    """WordNet id -> words, from `words.txt`."""
    lines = (folder / "words.txt").read_text().splitlines()
    return {wnid: words for wnid, _, words in (line.partition("\t") for line in lines) if words}
