"""Files that are whole or not there: written beside their place, then renamed. And names that never collide."""

import io
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from iared2.data.pictures import show
from iared2.errors import DataError

_LONGEST = 60  # characters of a name made from a file's name
RESERVED = frozenset({"index.html", "manifest.json"})


class OutputError(DataError):
    """A result that could not be written: a full disk, a read-only folder."""


def open_folder(folder: Path) -> Path:
    """Makes the output folder, or says why it cannot be one.

    Raises:
        OutputError: it is a file, or may not be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{show(folder)}: the output must be a folder, but this is a file; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{show(folder)}: the output folder cannot be written to ({error.strerror})") from None
    return folder


def write(path: Path, content: bytes) -> Path:
    """Writes a file atomically.

    Raises:
        OutputError: it could not be written; nothing is left of it, and an older file of that name stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{show(path)}: cannot be written ({error.strerror}); free some space or choose another --output") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


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
