"""Work over many files in shards on a Ray cluster: finished shards are recorded, and skipped when the work is asked for again.

Ray is an optional extra, imported only here.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iared2.errors import ConfigError, DataError

logger = logging.getLogger("iared2.data")

Work = Callable[[int], Any]  # the number of a shard -> its result, which must survive pickling


@dataclass(frozen=True)
class Cluster:
    """Where shards are worked on.

    Attributes:
        address: of a running cluster ("auto", HOST:PORT, ray://HOST:10001); None starts one on this machine.
        workers: processes at most; None takes as many as the cluster has CPUs (or GPUs, if `gpus` is set).
        gpus: GPUs for each process.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float = 0

    def run(self, build: Callable[..., Work], arguments: tuple, shards: int, records: Path) -> list[Any]:
        """The results of all shards in order; those that `records` holds are not worked on again.

        A worker that dies is started anew, and its shard done again. Every worker writes its records itself, so that the folder
        must be one that all machines share.

        Args:
            build: called once in each worker with `arguments`; gives what works on shards. Both are pickled.
            shards: how many there are.

        Raises:
            ConfigError: Ray is not installed, or the cluster cannot be reached.
            DataError: a record that cannot be written.
        """
        records = records.absolute()
        try:
            records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{records}: cannot keep the records of finished shards ({error.strerror}); choose another output") from None
        missing = [number for number in range(shards) if not _record(records, number).is_file()]
        if len(missing) < shards:
            logger.info("%d of %d shards were finished before", shards - len(missing), shards)
        if missing:
            self._work(build, arguments, missing, records)
        # Written by this program for itself, and of more than tensors.
        return [torch.load(_record(records, number), weights_only=False) for number in range(shards)]

    def _work(self, build: Callable[..., Work], arguments: tuple, missing: Sequence[int], records: Path) -> None:
        ray = _started(self.address)
        resource = "GPU" if self.gpus else "CPU"
        most = max(1, int(ray.cluster_resources().get(resource, 1) / (self.gpus or 1)))
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(self.workers or most, most, len(missing)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        dataset = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        done = dataset.map_batches(
            _Worker, fn_constructor_args=(build, arguments, str(records)), batch_size=1, compute=pool, num_gpus=self.gpus or None
        )
        try:
            for count, row in enumerate(done.iter_rows(), 1):
                logger.info("shard %d is finished (%d of %d)", row["shard"], count, len(missing))
        except ray.exceptions.RayTaskError as error:  # what a worker raised, as it raised it
            raise error.as_instanceof_cause() from None


class _Worker:
    """One process of the pool: builds its work once, then writes a record for each shard."""

    def __init__(self, build: Callable[..., Work], arguments: tuple, records: str) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.work, self.records = build(*arguments), Path(records)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["shard"].tolist():
            path = _record(self.records, number)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            torch.save(self.work(number), partial)
            partial.replace(path)
        return batch


def _record(records: Path, number: int) -> Path:
    return records / f"shard-{number:06d}.pt"


def _started(address: str | None) -> Any:
    """Ray, connected."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--ray: got no Ray Data ({error.name or error} is missing); pip install 'iared2[ray]'") from None
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if address is None else None)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        wanted = "wanted a running cluster (auto, HOST:PORT or ray://HOST:10001); leave it out for one on this machine"
        raise ConfigError(f"--ray-address: got {address!r}, {wanted} ({reason})") from None
    return ray


def shards_of(count: int, size: int) -> list[range]:
    """`count` items in runs of `size`."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def fingerprint(*facts: Any) -> str:
    """A name for what decides results: other facts, other records."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def stamp(path: Path) -> tuple[str, int, int]:
    """Name, size and time of a file: a changed picture is another one."""
    try:
        about = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), about.st_size, about.st_mtime_ns


def weights_of(state: Mapping[str, torch.Tensor]) -> str:
    """A digest of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
