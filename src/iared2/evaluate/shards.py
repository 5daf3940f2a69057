"""Any methods on any pictures, shard by shard: finished shards are recorded, and not done again.

This module knows no method and no figure. `ShardedMethods` walks; what is read, scored and summed up is said by those who inherit from it.
"""

import json
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from iared2 import __version__
from iared2.data.cluster import fingerprint, shards_of, weights_of
from iared2.data.images import first_reason, note_broken, reason
from iared2.data.views import seeded
from iared2.errors import ConfigError, DataError, IARED2Error
from iared2.evaluate.classify import eval_preprocess
from iared2.evaluate.machine import synchronise
from iared2.model import ReducedTransformer
from iared2.runtime import precision
from iared2.saving import sha256
from iared2.seeds import derive_seed


class Explainer(Protocol):
    """What makes maps: images (B, 3, H, W) and the classes to explain (None: those that the model names) -> maps (B, h, w).

    Attributes:
        forwards: cost of a map in forward passes of the model, as it was in the last batch.
        slow: whether it costs so much that a subset of the images must do.
    """

    name: str
    slow: bool

    @property
    def forwards(self) -> float: ...

    def __call__(self, images: Tensor, target: Tensor | None = None, /) -> Tensor: ...


FORWARDS = "forwards"  # among what is recorded of each picture
Find = Callable[[str, ReducedTransformer, int], Explainer]  # name, model, seed


class RunOptions(Protocol):
    """What every run over shards must be told; `SegmentOptions` says what the fields mean."""

    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def slow_limit(self) -> int: ...


class Pictures(Protocol):
    """Pictures by number, each with a name and with what tells a changed file from the one before."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def stamps(self) -> Sequence[object]: ...
    @property
    def skipped(self) -> dict[str, str]: ...

    def __len__(self) -> int: ...

    def subset(self, count: int, seed: int) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """What one method did on one shard.

    Attributes:
        found: by name, one entry per picture; empty where no picture could be read.
        seconds: for the maps alone.
        skipped: broken pictures.
    """

    found: dict[str, list[Any]]
    seconds: float
    skipped: dict[str, str]


class Records:
    """Finished shards, in a folder or, without one, for as long as the process lives."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.kept = folder, dict[tuple[str, int], Shard]()

    def get(self, key: str, number: int) -> Shard | None:
        """What is recorded, or None; a damaged record counts as none."""
        if (key, number) not in self.kept and self.folder is not None:
            try:
                self.kept[key, number] = Shard(**json.loads(self._path(key, number).read_text()))
            except (OSError, ValueError, TypeError):
                return None
        return self.kept.get((key, number))

    def put(self, key: str, number: int, shard: Shard) -> None:
        """Records a shard in one move.

        Raises:
            DataError: it cannot be written.
        """
        self.kept[key, number] = shard
        if self.folder is None:
            return
        path = self._path(key, number)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(shard)))
            part.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot keep finished shards ({error.strerror or error}); choose another output") from None

    def _path(self, key: str, number: int) -> Path:
        assert self.folder is not None  # noqa: S101 - both callers have looked
        return self.folder / key / f"{number:06d}.json"


@dataclass(frozen=True)
class MethodRow:
    """What one method's maps cost, or why there are none; those who inherit from it add figures.

    Attributes:
        forwards: cost of a map in forward passes.
        milliseconds: per map, median over shards; None without figures.
        why: one line that says why there are no figures.
    """

    method: str
    images: int = 0
    forwards: float | None = None
    milliseconds: float | None = None
    slow: bool = False
    why: str | None = None

    def spent(self) -> dict[str, Any]:
        """What JSON says of a method beside its figures."""
        return {
            "forwards": self.forwards,
            "milliseconds": None if self.milliseconds is None else round(self.milliseconds, 3),
            "images": self.images,
            "slow": self.slow,
            "error": self.why,
        }


def plain(value: float | None) -> float | None:
    """A number that JSON can hold."""
    return None if value is None or not math.isfinite(value) else round(value, 4)


def plain_by_name(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float | None]:
    """Figures for JSON; what has no value is null."""
    return {name: plain(figures.get(name)) for name in names}


def plain_pairs(pairs: Mapping[str, tuple[float, float]], names: Sequence[str]) -> dict[str, list[float | None] | None]:
    """Intervals for JSON; what has no value is null."""
    return {name: [plain(end) for end in pairs[name]] if name in pairs else None for name in names}


Data = TypeVar("Data", bound=Pictures)
Batch = TypeVar("Batch")
Row = TypeVar("Row")


class ShardedMethods(ABC, Generic[Data, Batch, Row]):
    """Methods on one model and one set of pictures.

    Args:
        find: gives an explainer by name, or raises ConfigError where this model cannot have it.
        records: folder for finished shards; None keeps them for as long as this object lives.
    """

    def __init__(self, model: ReducedTransformer, data: Data, find: Find, options: RunOptions, records: Path | None = None) -> None:
        self.model, self.data, self.find, self._run_options = model.eval(), data, find, options
        self.how, self.records, self.skipped = eval_preprocess(model), Records(records), dict[str, str]()
        self._facts = (__version__, weights_of(model.state_dict()), model.config.model_dump_json(), self.how)

    @abstractmethod
    def deciding(self) -> tuple[Any, ...]:
        """Options that decide results: other ones, other records."""

    @abstractmethod
    def read(self, data: Data, rows: range) -> Batch | None:
        """The readable pictures of `rows`; None if there is none. Broken ones are noted in `data.skipped`."""

    @abstractmethod
    def score(self, name: str, batch: Batch, seed: int) -> tuple[dict[str, list[Any]], float]:
        """One method on one batch: what is known of each picture, by name, and the seconds for the maps."""

    @abstractmethod
    def row(self, explainer: Explainer, name: str, shards: list[Shard]) -> Row:
        """A method's figures from its shards, of which each holds a picture."""

    @abstractmethod
    def no_row(self, name: str, slow: bool, why: str) -> Row:
        """A method without figures."""

    def run(self, methods: Sequence[str], advance: Callable[[int], object] | None = None) -> list[Row]:
        """A row for each method, in order. What was recorded before is not done again.

        Args:
            advance: told of images that are done with, method by method; `work` says how many there will be.

        Raises:
            DataError: no picture can be read.
        """
        advance = advance or (lambda _: None)
        options, rows, found = self._run_options, dict[str, Row](), dict[str, Explainer]()
        for name in methods:
            try:
                found[name] = self.find(name, self.model, options.seed)
            except (IARED2Error, RuntimeError) as error:
                rows[name] = self.no_row(name, False, why(error))
                advance(len(self.data))
        for slow, data in ((False, self.data), (True, self.data.subset(options.slow_limit, options.seed))):
            part = {name: explainer for name, explainer in found.items() if explainer.slow is slow}
            shards, failed = self._walk(part, data, advance)
            for name, explainer in part.items():
                rows[name] = self.no_row(name, slow, failed[name]) if name in failed else self._row(explainer, name, shards[name])
        return [rows[name] for name in methods]

    def work(self, methods: Sequence[str]) -> int:
        """At most how many images `run` tells of."""
        return len(methods) * len(self.data)

    def _walk(
        self, explainers: dict[str, Explainer], data: Data, advance: Callable[[int], object]
    ) -> tuple[dict[str, list[Shard]], dict[str, str]]:
        """All methods on a shard, then the next shard, so that pictures are decoded once. Gives shards and reasons by method."""
        shards: dict[str, list[Shard]] = {name: [] for name in explainers}
        failed: dict[str, str] = {}
        keys = {name: self._key(name, data) for name in explainers}
        for number, rows in enumerate(shards_of(len(data), self._run_options.batch_size)):
            batch, decoded = None, False
            for name in explainers:
                shard = None if name in failed else self.records.get(keys[name], number)
                if shard is None and name not in failed:
                    if not decoded:
                        batch, decoded = self.read(data, rows), True
                    try:
                        shard = self._shard(name, batch, (data, rows, number))
                    except (IARED2Error, RuntimeError) as error:
                        failed[name] = why(error)
                    else:
                        self.records.put(keys[name], number, shard)
                if shard is not None:
                    shards[name].append(shard)
                advance(len(rows))
        return shards, failed

    def _key(self, name: str, data: Data) -> str:
        options = self._run_options
        how = (options.batch_size, options.seed, options.dtype, *self.deciding())
        stem = "".join(c if c.isalnum() else "_" for c in name)
        return f"{stem}-{fingerprint(_with_content(name), self._facts, how, data.names, data.stamps)}"

    def _shard(self, name: str, batch: Batch | None, where: tuple[Data, range, int]) -> Shard:
        """One method on one shard; what it draws depends on the shard alone, so that a run that goes on is the undisturbed one."""
        data, rows, number = where
        names = {data.names[row] for row in rows}
        skipped = {picture: cause for picture, cause in data.skipped.items() if picture in names}
        if batch is None:
            return Shard({}, 0.0, skipped)
        seed = derive_seed(self._run_options.seed, number) % 2**31
        with seeded(seed), precision(next(self.model.parameters()).device, self._run_options.dtype):
            found, seconds = self.score(name, batch, seed)
        return Shard(found, seconds, skipped)

    def _row(self, explainer: Explainer, name: str, shards: Iterable[Shard]) -> Row:
        shards = list(shards)
        for shard in shards:
            for picture, cause in shard.skipped.items():
                note_broken(self.skipped, picture, cause)
        full = [shard for shard in shards if shard.found]
        if not full:
            raise DataError(f"none of the {len(self.data)} pictures can be read; the first: {first_reason(self.skipped)}")
        return self.row(explainer, name, full)


def _with_content(name: str) -> object:
    """What tells a method from others: its name and, where a file stands behind the colon, what is in that."""
    path = Path(name.partition(":")[2])
    return (name, sha256(path)) if path.is_file() else name


def mean_forwards(explainer: Explainer, shards: Sequence[Shard]) -> float:
    """Cost of a map, mean over pictures: ours depends on how many patches stay."""
    return statistics.fmean(one for shard in shards for one in shard.found.get(FORWARDS, [explainer.forwards]))


def timed(explainer: Explainer, images: Tensor, target_B: Tensor | None) -> tuple[Tensor, float]:
    """Maps of a batch, and the seconds they took."""
    synchronise(images.device)
    start = time.perf_counter()
    map_Bhw = explainer(images, target_B)
    synchronise(images.device)
    return map_Bhw.detach().float(), time.perf_counter() - start


def check_class(target: int | None, classes: int) -> None:
    """Looks whether the model knows a class that --target names.

    Raises:
        ConfigError: it does not; the message says which ones it knows.
    """
    if target is None:
        return
    if classes < 1:
        raise ConfigError(f"--target: got {target}, but this model has no classifier; leave it out")
    if not 0 <= target < classes:
        raise ConfigError(f"--target: got class {target}, outside the model's {classes} classes; wanted 0 to {classes - 1}")


def why(error: Exception) -> str:
    """Why a method gave no figures, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "a batch does not fit into the device's memory; use a smaller --batch-size"
    return reason(error)
