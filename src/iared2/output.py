"""Output folders that can be written to, found out before the work; and files that are whole or not there."""

import tempfile
from contextlib import suppress
from pathlib import Path

from iared2.data.pictures import show
from iared2.errors import DataError


class OutputError(DataError):
    """A result that could not be written: a full disk, a read-only folder."""


def open_folder(folder: Path) -> Path:
    """Makes the output folder, or says why it cannot be one.

    Raises:
        OutputError: it is a file, or may not be made or written to.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{show(folder)}: the output must be a folder, but this is a file; choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{show(folder)}: the output folder cannot be written to ({error.strerror}); choose another name") from None
    return folder


def write(path: Path, content: bytes) -> Path:
    """Writes a file atomically: beside its place, then renamed.

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
