"""Pictures from anywhere: found by path, folder or pattern, and read into plain 8-bit RGB whatever they hold.

A file from outside is hostile until read: its size is judged by the header before anything is decoded, only
picture formats are tried, and whatever a decoder raises becomes one `DataError` that names the file.
"""

import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from iared2.errors import DataError

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .bmp .dib .tif .tiff .avif .avifs .ppm .pgm .pbm .pnm .jp2 .j2k .jpx".split()
)
_PAPER = (255, 255, 255)  # what transparent pixels are laid on


@dataclass(frozen=True)
class Picture:
    """One picture, ready to use.

    Attributes:
        path: the file it came from.
        image: 8-bit RGB, upright.
        notes: what had to be done to it, one clause each (first frame of an animation, turned by EXIF, ...).
    """

    path: Path
    image: Image.Image
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Failure:
    """A file that could not be used, and why."""

    path: Path
    reason: str


# ---- finding ------------------------------------------------------------------------------------------------


RESULTS = ("kept.npy", "hierarchy.png")  # a folder that holds these is an earlier run's result for one photo


def find_pictures(sources: Iterable[str | Path]) -> tuple[list[Path], list[Failure]]:
    """Pictures named by files, folders (searched with their sub-folders) and glob patterns, each once, in order.

    Pictures that an earlier run made (in folders that hold `RESULTS`) are left out, unless they are named one by one.

    Returns:
        The files to read, and the sources that led to none.
    """
    found: dict[Path, Path] = {}
    failures: list[Failure] = []
    for source in sources:
        try:
            paths = _resolve(Path(source), failures)
        except DataError as error:
            failures.append(Failure(Path(source), str(error)))
            continue
        for path in paths:
            found.setdefault(path.parent.resolve() / path.name, path)  # a/x.jpg and a/../a/x.jpg are one
    return list(found.values()), failures


def _resolve(source: Path, failures: list[Failure]) -> list[Path]:
    try:
        mode = source.stat().st_mode
    except PermissionError:
        raise DataError(f"{show(source)}: no permission to look there") from None
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return _match(source)
    if not stat.S_ISDIR(mode):
        return [source]
    before = len(failures)
    pictures = list(_walk(source, failures))
    if not pictures and len(failures) == before:
        kinds = "jpg, png, gif, webp, tiff, bmp, avif, ...; not into results of earlier runs"
        raise DataError(f"{show(source)}: no pictures in this folder or below it (looked for {kinds})")
    return pictures


def _match(source: Path) -> list[Path]:
    if not glob.has_magic(str(source)):
        raise DataError(f"{show(source)}: no such file or folder")
    matches = sorted(Path(name) for name in glob.glob(str(source), recursive=True))  # noqa: PTH207 - the pattern may be absolute
    pictures = [path for path in matches if path.is_file() and not _is_result(path.parent)]
    if not pictures:
        raise DataError(f"{show(source)}: no file matches this pattern")
    return pictures


def _walk(folder: Path, failures: list[Failure]) -> Iterable[Path]:
    def refused(error: OSError) -> None:
        where = Path(error.filename or folder)
        failures.append(Failure(where, f"{show(where)}: the folder cannot be read ({error.strerror})"))

    for root, folders, names in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_result(Path(root) / name))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root) / name


def _is_result(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RESULTS)


def show(path: Path) -> str:
    """A path as text that every screen, page and JSON file can hold, whatever bytes its name is made of."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# ---- reading ------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Picture:
    """Reads one picture as upright 8-bit RGB.

    Raises:
        DataError: the file is missing, no picture, damaged, or too small or large; one line that says which.
    """
    name = show(path)
    try:
        _require_content(path)
        with Image.open(path, formats=FORMATS) as image:
            _require_size(image)
            return Picture(path, *_plain(image))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except PermissionError:
        raise DataError(f"{name}: no permission to read it") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: not a picture, whatever its name says (tried {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: {_too_large(None)}") from None
    except Exception as error:  # noqa: BLE001 - decoders raise nearly anything on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{name}: damaged or incomplete picture ({reason})") from None


def _require_content(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file")
    if status.st_size == 0:
        raise DataError("the file is empty")


def _too_large(size: tuple[int, int] | None) -> str:
    got = f"{size[0]}x{size[1]} pixels" if size else "far too many pixels"
    return f"{got}; at most {MAX_PIXELS // 1_000_000} million are read, so scale it down first"


def _require_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(_too_large(image.size))
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{width}x{height} pixels; too small to explain, at least {MIN_SIDE}x{MIN_SIDE} are needed")


def _plain(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame, upright, in 8-bit RGB; and what that took."""
    image.load()
    upright, turned = _upright(image)
    rgb, note = _to_rgb(upright)
    notes = [_frames(image), turned, note]
    return rgb, tuple(text for text in notes if text)


def _frames(image: Image.Image) -> str | None:
    if image.format == "MPO":  # one photo with previews or depth, as phones write them
        return None
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # noqa: BLE001 - a later frame is damaged; the first one was read
        return "first frame of an animation whose later frames are damaged"
    kind = "pages" if image.format == "TIFF" else "frames"
    return f"first of {count} {kind}" if count > 1 else None


def _upright(image: Image.Image) -> tuple[Image.Image, str | None]:
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image), f"turned upright (EXIF orientation {orientation})"
    except Exception:  # noqa: BLE001 - damaged EXIF says nothing; the pixels are still good
        return image, None
    return image, None


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image.copy(), None
    if mode.startswith("I;16"):
        return _grey((np.asarray(image) >> 8).astype(np.uint8)), "16-bit grey scaled to 8 bits"
    if mode in ("I", "F"):
        return _grey((_unit(np.asarray(image).astype(np.float64)) * 255).round().astype(np.uint8)), "high-depth grey scaled to 8 bits"
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            return rgba.convert("RGB"), None
        paper = Image.new("RGBA", rgba.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB"), "transparent parts laid on white"
    return image.convert("RGB"), "CMYK converted to RGB" if mode == "CMYK" else None


def _unit(values: np.ndarray) -> np.ndarray:
    """Any numbers -> 0..1: as they are, as 16 bits, or stretched from lowest to highest."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return values
    if low >= 0 and 255 < high <= 65535:
        return values / 65535
    return (values - low) / max(high - low, np.finfo(np.float64).tiny)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")
