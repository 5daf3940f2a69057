"""ImageNet-Segmentation as its authors give it: `gtsegs_ijcv.mat`, a MATLAB 7.3 file, which is HDF5 (Guillaumin, Kuettel, Ferrari 2014).

`/value/img` and `/value/gt` hold one reference per picture: to the picture, and to its mask (or to a cell of masks, of which the first
counts). MATLAB writes arrays column by column, so that a picture of height x width x 3 is found as (3, width, height). Read with h5py,
an optional package.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iared2.data.cluster import stamp
from iared2.data.images import reason
from iared2.data.masks import MaskedImages
from iared2.errors import DataError

_DEEPEST = 4  # references that lead to references; more are a circle


def open_gtsegs(path: Path) -> MaskedImages:
    """Opens the file; pictures are read when asked for.

    Raises:
        DataError: h5py is missing, or the file is not laid out as above.
    """
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path}: reading .mat files needs h5py, which is not installed; pip install 'iared2[data]'") from None
    try:
        with h5py.File(path, "r") as file:
            counts = [file["value"][name].size for name in ("img", "gt")]
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        wanted = "wanted a MATLAB 7.3 file with /value/img and /value/gt"
        raise DataError(f"{path}: cannot be read as ImageNet-Segmentation ({reason(error)}); {wanted}") from None
    if counts[0] != counts[1] or not counts[0]:
        raise DataError(f"{path}: {counts[0]} pictures and {counts[1]} masks; wanted one mask per picture, and at least one")
    names = [f"{path.name}:{row}" for row in range(counts[0])]
    stamps = [(stamp(path), row) for row in range(counts[0])]
    return MaskedImages(partial(_image, path), partial(_mask, path), _no_band, names, stamps)


def _read(path: Path, part: str, index: int) -> np.ndarray:
    """The array that the reference at `index` leads to, axes in reverse order: as MATLAB showed it."""
    import h5py

    with h5py.File(path, "r") as file:
        found: Any = np.asarray(file["value"][part]).ravel()[index]
        for _ in range(_DEEPEST):
            if not isinstance(found, h5py.Reference):
                break
            values = np.asarray(file[found])
            found = values.ravel()[0] if values.dtype == object and values.size else values
        if not isinstance(found, np.ndarray) or found.dtype == object:
            raise DataError(f"/value/{part} number {index} leads to no array")
        return found.T


def _image(path: Path, index: int) -> Image.Image:
    values = _read(path, "img", index)
    if values.ndim not in (2, 3) or values.dtype != np.uint8 or (values.ndim == 3 and values.shape[2] not in (1, 3)):
        raise DataError(f"a picture of shape {values.shape} and type {values.dtype}, wanted height x width x 3 of uint8")
    return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.ndim == 3 and values.shape[2] == 1 else values)).convert("RGB")


def _mask(path: Path, index: int) -> np.ndarray:
    return _read(path, "gt", index)


def _no_band(index: int) -> None:
    del index
