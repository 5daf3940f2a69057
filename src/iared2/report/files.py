"""Pictures and arrays as bytes, and names that never collide."""

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from iared2.data.pictures import show

_LONGEST = 60  # characters of a name made from a file's name
RESERVED = frozenset({"index.html", "manifest.json"})


def png(image: Image.Image) -> bytes:
    """A picture as PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=4)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as .npy."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A folder name for each path: its stem; with its ending where two share a stem; with its folders where that is not enough.

    Names differ even where capitals do not count.
    """
    forms = [[_safe(path.stem) for path in paths], [_safe(path.name) for path in paths], [_safe(text) for text in _relative(paths)]]
    taken: set[str] = set(RESERVED)
    names = []
    counts = [_counts(form) for form in forms]
    for index in range(len(paths)):
        choices = [form[index] for form, count in zip(forms, counts, strict=True) if count[form[index].casefold()] == 1]
        name = next((choice for choice in choices if choice.casefold() not in taken), None)
        name = _numbered(forms[-1][index], taken) if name is None else name
        taken.add(name.casefold())
        names.append(name)
    return names


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name.casefold()] = counts.get(name.casefold(), 0) + 1
    return counts


def _relative(paths: Sequence[Path]) -> list[str]:
    """Each path below the folder that all of them share."""
    absolute = [path.absolute() for path in paths]
    shared = Path(os.path.commonpath([path.parent for path in absolute])) if absolute else Path()
    return [str(path.relative_to(shared)) for path in absolute]


def _numbered(name: str, taken: set[str]) -> str:
    number = 2
    while f"{name}-{number}".casefold() in taken:
        number += 1
    return f"{name}-{number}"


def _safe(text: str) -> str:
    """Letters, digits, dots, dashes and underscores: a name that every file system and link takes."""
    shown = show(Path(text))
    return re.sub(r"[^\w.-]+", "_", shown).strip("._-")[-_LONGEST:] or "photo"
