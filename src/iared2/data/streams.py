"""Labelled pictures that can only be read from front to back: WebDataset shards, streamed hub data sets."""

import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor

from iared2.data.arrays import ReadBatches
from iared2.data.images import note_broken, reason
from iared2.data.views import make_transform, seeded
from iared2.errors import DataError, HubError
from iared2.seeds import derive_seed

Sample = tuple[str, Image.Image, int]
IMAGE_KEYS = ("jpg", "png", "webp")  # what timm's WebDataset reader takes for pictures


@dataclass(frozen=True)
class StreamedImages:
    """Labelled pictures in a fixed order, read from front to back as often as asked.

    Attributes:
        start: starts a pass; gives name, RGB picture and label of each sample that can be read.
        examples: how many samples there are, broken ones included.
        skipped: name -> reason of every picture found broken so far.
        part: starts a pass over samples `first` to `stop` alone, where that takes less than reading all.
    """

    start: Callable[[], Iterator[Sample]] = field(repr=False)
    examples: int
    skipped: dict[str, str] = field(default_factory=dict, repr=False)
    part: Callable[[int, int], Iterator[Sample]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.examples

    def __iter__(self) -> Iterator[Sample]:
        return self.start()

    def subset(self, count: int, seed: int = 0) -> "StreamedImages":  # noqa: ARG002 - the same call as for other data
        """The first `count` samples: a stream has no others without reading all."""
        return replace(self, start=partial(_first, self.start, count), examples=min(count, self.examples))

    def share(self, number: int, world: int) -> Iterator[tuple[int, Sample]]:
        """One of `world` shares, which together hold every sample once; each sample with a number of its own, the same in every pass.

        Shards are split by samples, not by files, so that shares differ by one sample at most however many shards there are.
        """
        if self.part is not None and world > 1:
            first, stop = self.examples * number // world, self.examples * (number + 1) // world
            yield from enumerate(self.part(first, stop), first)
            return
        for position, sample in enumerate(self.start()):
            if position % world == number:
                yield position, sample


def _first(start: Callable[[], Iterator[Sample]], count: int) -> Iterator[Sample]:
    return islice(start(), count)


def open_stream(prefix: str, rest: str, splits: Sequence[str], root: Path | None) -> StreamedImages:
    """A stream through timm's readers; the splits are spellings of one name.

    Raises:
        DataError: no shards, or nothing that can be counted.
        HubError: a hub data set that cannot be had.
    """
    skipped: dict[str, str] = {}
    if prefix == "wds":
        folder, shards = _shards(rest, splits)
        keys = {shard: list(_keys(folder / shard)) for shard in shards}
        examples = sum(map(len, keys.values()))
        if not examples:
            raise DataError(f"wds/{rest}: no pictures in the shards; wanted tar files with KEY.jpg (or png, webp) and KEY.cls")
        part = partial(_pass_shards, folder, keys, skipped)
        return StreamedImages(partial(part, 0, examples), examples, skipped, part)
    problem: Exception | None = None
    for split in splits:
        try:
            reader = _undivided(create_reader(f"{prefix}/{rest}", root=None if root is None else str(root), split=split))
            return StreamedImages(partial(_pass_reader, reader, rest), len(reader), skipped)
        except ValueError as error:
            problem = problem or error
        except (OSError, RuntimeError) as error:
            raise HubError(f"data set {rest!r} cannot be had ({reason(error)}); check the name, or connect to the network") from None
    raise DataError(f"{prefix}/{rest}: no split {splits[0]!r} that can be read ({reason(problem or ValueError(''))})")


def _shards(rest: str, splits: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder and the shard names of a folder, of one shard, or of a pattern with braces."""
    from webdataset.shardlists import expand_urls

    path = Path(rest)
    if not path.is_dir():
        names = list(expand_urls(path.name))
        absent = [name for name in names if not (path.parent / name).is_file()]
        if absent:
            wanted = "a folder of .tar shards, or names like x-{0000..0009}.tar"
            raise DataError(f"wds/{rest}: no shard {path.parent / absent[0]}; wanted {wanted}")
        return path.parent, names
    for folder in (*(path / split for split in splits), path):
        found = sorted(shard.name for shard in folder.glob("*.tar")) if folder.is_dir() else []
        named = [name for name in found if any(split in name for split in splits)]
        if found:
            return folder, named if folder == path and named else found
    raise DataError(f"wds/{rest}: no .tar shards in this folder")


def _keys(shard: Path) -> Iterator[str]:
    """Names of the samples in a shard, without reading the pictures."""
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isfile() and extension.lower() in IMAGE_KEYS:
                    yield folder + slash + key
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard}: not a readable tar ({reason(error)})") from None


def _undivided(reader: Any) -> Any:
    """A timm reader that gives everything on every rank: left alone it deals out whole shards, as many as happen to come."""
    if hasattr(reader, "dist_rank"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return reader


def _pass_shards(folder: Path, keys: dict[str, list[str]], skipped: dict[str, str], first: int, stop: int) -> Iterator[Sample]:
    """One pass over samples `first` to `stop` of the shards, opening no others; a key that does not come out was broken (timm logs why)."""
    chosen, before, position = [], 0, 0
    for shard, names in keys.items():
        if position < stop and position + len(names) > first and names:
            chosen.append(shard)
        before += len(names) if position + len(names) <= first else 0
        position += len(names)
    if not chosen:
        return
    reader = _undivided(create_reader("wds/", root=str(folder), split="::".join(chosen)))
    next(iter(reader), None)  # timm builds its pipeline on first use
    expected = enumerate((key for shard in chosen for key in keys[shard]), before)
    for sample in reader.ds:
        for number, key in expected:
            if number >= stop:
                return
            if key == sample["__key__"]:
                break
            if number >= first:
                note_broken(skipped, key, "cannot be decoded, or has no label")
        if number >= first:
            yield sample["__key__"], sample["image"], int(sample["target"])
    for number, key in expected:
        if first <= number < stop:
            note_broken(skipped, key, "cannot be decoded, or has no label")


def _pass_reader(reader: Any, name: str) -> Iterator[Sample]:
    for number, (image, label) in enumerate(reader):
        yield f"{name}:{number}", image.convert("RGB"), int(label)


@dataclass(frozen=True)
class StreamBatches(ReadBatches[StreamedImages]):
    """Batches over a stream, with the protocol of `ArrayBatches` and as reproducible.

    Training shuffles through a buffer. A resumed epoch reads past what was seen. Of shards each rank reads its share alone, another
    one in each epoch; of other streams it reads all and keeps every `world`-th sample. `indices` are numbers of samples in the stream.
    """

    buffer: int = 2048

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch for one rank, from step `start` on."""
        transform = make_transform(self.how, self.train)
        samples = self._samples(epoch, (rank + epoch) % world if self.train else rank, world)
        for step in range(self.steps(world)):
            chunk = list(islice(samples, self.batch_size))
            if not chunk:
                return
            if step < start:
                continue
            views = []
            for number, (_, image, _) in chunk:
                with seeded(self.seed, epoch, number, active=self.train):
                    views.append(transform(image))
            labels, numbers = torch.tensor([label for _, (_, _, label) in chunk]), torch.tensor([number for number, _ in chunk])
            yield {"images": torch.stack(views), "labels": labels, "indices": numbers}

    def _samples(self, epoch: int, share: int, world: int) -> Iterator[tuple[int, Sample]]:
        if not self.train:
            yield from self.images.share(share, world)
            return
        draw = random.Random(derive_seed(self.seed, epoch, share))
        waiting: list[tuple[int, Sample]] = []
        found = True
        while found:  # again from the front where broken pictures left the epoch short
            found = False
            for sample in self.images.share(share, world):
                found = True
                waiting.append(sample)
                if len(waiting) >= min(self.buffer, self.examples):
                    yield waiting.pop(draw.randrange(len(waiting)))
            while waiting:
                yield waiting.pop(draw.randrange(len(waiting)))
        raise DataError("no picture of the stream can be read")
