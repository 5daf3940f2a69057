"""Opens labelled pictures wherever they are: folders, archives, tables, hub data sets, WebDataset shards.

| source | what it is |
|---|---|
| folder | one subfolder per class; or with a `labels.csv` (file, class_index); or Tiny-ImageNet as AVIF mosaics |
| x.tar | pictures in one folder per class |
| x.parquet | columns `image` (bytes, or a struct with bytes and path) and `label` (integer) |
| hfds/NAME | a hub data set, or a folder that the `datasets` package reads |
| wds/FOLDER, wds/SHARDS | WebDataset shards, read as a stream |
| hfids/NAME, tfds/NAME, torch/NAME | what timm.data reads under these prefixes |
"""

import csv
import importlib.util
import io
import logging
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader

from iared2.data.arrays import ImageArrays
from iared2.data.images import LabelledImages, OpenFile, reason
from iared2.data.labels import are_wordnet_ids, match_classes, relabel
from iared2.data.streams import StreamedImages, open_stream
from iared2.data.tiny_imagenet import is_tiny_imagenet, load_tiny_imagenet
from iared2.errors import DataError, HubError

logger = logging.getLogger("iared2.data")

Data = LabelledImages | StreamedImages | ImageArrays

NEEDS = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets", "torch": "torchvision"}
STREAMS = ("wds", "hfids", "tfds")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = (("train", "training"), ("val", "validation", "valid", "eval", "test"))


NO_LABEL = -1


def open_data(
    source: str | Path, split: str = "val", classes: Sequence[str] | None = None, root: Path | None = None, labels: bool = True
) -> Data:
    """Opens labelled pictures.

    Args:
        source: a path or a prefixed name, as in the table above.
        split: "train" or "val", where the source has several (a folder may have a subfolder of that name).
        classes: the model's class ids in label order (`model_class_ids`); classes of that name get that label.
        root: where `torch/` and hub data sets are kept on disk.
        labels: whether they are needed; a plain folder of pictures is taken where they are not, with `NO_LABEL` for each.

    Raises:
        DataError: nothing there, nothing readable in it, or an optional package is missing.
        HubError: a hub data set that cannot be had.
    """
    prefix, _, rest = str(source).partition("/")
    if prefix.lower() in NEEDS and rest and not Path(source).exists():
        return _open_prefixed(prefix.lower(), rest, split, classes, root)
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".tar":
        return _open_tar(path, classes)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _open_parquet(path)
    if not path.is_dir():
        state = "not a .tar or .parquet file" if path.exists() else "no such folder or file"
        wanted = "a folder of class folders or with a labels.csv, a .tar, a .parquet file, or a name like hfds/NAME"
        raise DataError(f"{path}: {state}; wanted {wanted}")
    if is_tiny_imagenet(path):
        try:
            arrays = load_tiny_imagenet(path, next((group[0] for group in SPLITS if split in group), split))
        except (OSError, IndexError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: Tiny-ImageNet's {split} split is not complete ({reason(error)})") from None
        return relabel(arrays, classes, str(path))
    for folder in (path, *(path / name for name in spellings(split))):
        if (folder / "labels.csv").is_file():
            return _open_table(folder)
    plain = None if labels else _open_plain(path)
    return _open_folder(path, split, classes) if plain is None else plain


def _open_plain(path: Path) -> LabelledImages | None:
    """All pictures in a folder and its sub-folders, by name; None if there are none."""
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not files:
        return None
    return LabelledImages(partial(_open_file, path, files), torch.full((len(files),), NO_LABEL), files)


def spellings(split: str) -> tuple[str, ...]:
    """The ways to write a split's name, the given one first."""
    return (split, *(name for group in SPLITS if split in group for name in group if name != split))


def _open_folder(path: Path, split: str, classes: Sequence[str] | None) -> LabelledImages:
    try:
        reader = create_dataset("", root=str(path), split=split, input_key=";".join(EXTENSIONS)).reader
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{path}: no pictures in it ({reason(error)}); where labels are needed: one subfolder per class, or labels.csv"
        ) from None
    kept = [i for i, (name, _) in enumerate(reader.samples) if Path(name).parent != Path(reader.root)]
    if not kept:
        raise DataError(f"{path}: pictures, but neither class subfolders nor a labels.csv (file, class_index); add one of them")
    if len(kept) < len(reader):
        logger.warning("%s: %d pictures outside class folders are left out", path, len(reader) - len(kept))
    names = [name for name in reader.class_to_idx if name]
    first = min(reader.class_to_idx[name] for name in names)  # loose pictures are timm's class "", sorted first
    targets = [target - first for _, target in reader.samples]
    found = _from_reader(reader, targets, reader.filenames(), names, (classes, str(path)))
    return found if len(kept) == len(reader) else found.select(kept)


def _open_tar(path: Path, classes: Sequence[str] | None) -> LabelledImages:
    try:
        # Without timm's cache of open files: they would share one position among forked workers.
        reader = create_reader("", root=str(path), cache_tarfiles=False)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a tar of pictures in class folders ({reason(error)})") from None
    names = list(reader.class_name_to_idx)
    return _from_reader(reader, reader.targets.tolist(), reader.filenames(), names, (classes, str(path)))


Wanted = tuple[Sequence[str] | None, str]  # the model's class ids, and the data's name for messages


def _from_reader(reader: Any, targets: list[int], files: list[str], found: list[str], wanted: Wanted) -> LabelledImages:
    """timm's reader with its targets mapped to the model's labels."""
    mapping = match_classes(found, *wanted)
    by_id = mapping != list(range(len(found)))
    class_ids = list(wanted[0]) if by_id and wanted[0] is not None else found
    return LabelledImages(partial(_open_reader, reader), torch.tensor(mapping)[targets], files, class_ids)


def _open_reader(reader: Any, index: int) -> OpenFile:
    return reader[index][0]


def _open_table(folder: Path) -> LabelledImages:
    """A folder with a labels.csv: columns file, class_index, and optionally source."""
    path = folder / "labels.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        missing = {"file", "class_index"} - set(rows[0] if rows else ())
        if missing:
            raise DataError(f"{path}: {'no rows' if not rows else 'no column ' + min(missing)}; wanted the columns file, class_index")
        labels = torch.tensor([_class_index(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({reason(error)})") from None
    files = [row["file"] for row in rows]
    sources = [row["source"] or "" for row in rows] if "source" in rows[0] else None
    return LabelledImages(partial(_open_file, folder, files), labels, files, sources=sources)


def _class_index(row: dict[str, str | None], where: str) -> int:
    if not row["file"]:
        raise DataError(f"{where}: no file named; wanted file, class_index")
    try:
        return int(row["class_index"] or "")
    except ValueError:
        raise DataError(f"{where}: class_index is {row['class_index']!r}, wanted a whole number") from None


def _open_file(folder: Path, files: list[str], index: int) -> OpenFile:
    return (folder / files[index]).open("rb")


def _open_parquet(path: Path) -> LabelledImages:
    """A parquet file, its encoded pictures held in memory (as large as the file)."""
    require("pyarrow")
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label"]).combine_chunks()
        images, labels = table.column("image"), torch.tensor(table.column("label").to_pylist(), dtype=torch.long)
    except (ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: wanted the columns image (bytes) and label (whole numbers): {reason(error)}") from None
    if not len(labels):
        raise DataError(f"{path}: no rows in it")
    kind, names = images.type, [f"{path.name}:{row}" for row in range(len(labels))]
    if pyarrow.types.is_struct(kind):
        parts = images.combine_chunks() if hasattr(images, "combine_chunks") else images
        fields = [kind.field(i).name for i in range(kind.num_fields)]
        if "bytes" not in fields:
            raise DataError(f"{path}: the column image has the fields {', '.join(fields)}; wanted bytes")
        if "path" in fields:
            names = [given or name for given, name in zip(parts.field("path").to_pylist(), names, strict=True)]
        images = parts.field("bytes")
    elif not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise DataError(f"{path}: the column image holds {kind}; wanted bytes, or a struct with bytes and path")
    return LabelledImages(partial(_open_bytes, images), labels, names)


def _open_bytes(column: Any, index: int) -> OpenFile:
    return io.BytesIO(column[index].as_py() or b"")


def _open_prefixed(prefix: str, rest: str, split: str, classes: Sequence[str] | None, root: Path | None) -> Data:
    require(NEEDS[prefix])
    if not Path(rest).exists() and Path("/", rest).exists():
        rest = f"/{rest}"  # pathlib made one slash of the two in hfds//absolute/path
    if prefix in STREAMS:
        return open_stream(prefix, rest, spellings(split), root)
    if prefix == "torch":
        try:
            dataset = create_dataset(f"torch/{rest}", root=str(root or "."), split=split)
        except (AssertionError, RuntimeError, OSError, ValueError) as error:
            raise DataError(f"torch/{rest}: cannot be opened in {root or 'this folder'} ({reason(error)})") from None
        return LabelledImages(partial(_open_item, dataset), torch.as_tensor(dataset.targets), [str(i) for i in range(len(dataset))])
    return _open_hub(rest, split, classes, root)


def _open_item(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _open_hub(name: str, split: str, classes: Sequence[str] | None, root: Path | None) -> LabelledImages:
    problem: Exception | None = None
    for spelling in spellings(split):
        try:
            reader = create_reader(f"hfds/{name}", root=None if root is None else str(root), split=spelling)
            break
        except ValueError as error:
            problem = problem or error  # an unknown split: try its other names
        except (OSError, RuntimeError) as error:
            way_out = "check the name, connect to the network, or give a folder on this machine"
            raise HubError(f"data set {name!r} cannot be had ({reason(error)}); {way_out}") from None
    else:
        raise DataError(f"hfds/{name}: no split {split!r} that can be read ({reason(problem or ValueError(''))})")
    found = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    targets = [int(label) for label in reader.dataset[reader.label_key]]
    files = [f"{name}:{spelling}:{row}" for row in range(len(targets))]
    if are_wordnet_ids(found) or (found and classes is not None and set(found) <= set(classes)):
        return _from_reader(reader, targets, files, found, (classes, f"hfds/{name}"))
    return LabelledImages(partial(_open_reader, reader), torch.tensor(targets), files, found)


def require(package: str) -> None:
    """Checks for an optional package.

    Raises:
        DataError: it is missing; the message names the extra to install.
    """
    if importlib.util.find_spec(package) is None:
        extra = "'iared2[data]'" if package in ("datasets", "webdataset", "pyarrow") else package.replace("_", "-")
        raise DataError(f"this data needs the package {package}, which is not installed; pip install {extra}")
