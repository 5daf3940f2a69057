"""`iared2 eval` over many pictures on a Ray cluster: the table of one machine, added up from shards."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from iared2.data.batches import make_batches
from iared2.data.cluster import Cluster, fingerprint, shards_of, weights_of
from iared2.data.sources import Data
from iared2.data.streams import StreamedImages
from iared2.errors import ConfigError
from iared2.evaluate.classify import Clock, Measured, eval_preprocess, outcomes, report
from iared2.evaluate.report import EvalReport
from iared2.model import ReducedTransformer
from iared2.runtime import precision

SHARD = 8  # batches: shards end where batches do, so that batches are those of one machine


@dataclass(frozen=True)
class EvalShards:
    """What a worker needs: how to open the model and the pictures, and how to run."""

    open_model: Callable[[], ReducedTransformer]
    open_pictures: Callable[[ReducedTransformer], Data]
    batch_size: int
    workers: int
    dtype: str


@dataclass(frozen=True)
class Part:
    """What one shard gave."""

    measured: list[Measured]
    seconds: dict[str, float]
    skipped: dict[str, str]


def evaluate_sharded(model: ReducedTransformer, pictures: Data, job: EvalShards, records: Path | None, cluster: Cluster) -> EvalReport:
    """Measures in shards; what `iared2 eval` gives on one machine, but for the speed, which adds up over workers.

    Args:
        records: folder for finished shards; None keeps them for this run alone.

    Raises:
        ConfigError: a stream, which cannot be shared out.
    """
    if isinstance(pictures, StreamedImages):
        raise ConfigError("--ray: got a stream, wanted pictures that can be opened by number (a folder, .tar, .parquet); leave --ray out")
    count = len(shards_of(len(pictures), SHARD * job.batch_size))
    settings = (model.config.model_dump_json(), job.batch_size, job.dtype, eval_preprocess(model))
    key = fingerprint(weights_of(model.state_dict()), settings, list(pictures.names), pictures.labels.tolist())
    with tempfile.TemporaryDirectory() as scratch:
        parts: list[Part] = cluster.run(_build, (job,), count, (records or Path(scratch)) / key)
    clock = Clock(next(model.parameters()).device)
    for part in parts:
        for name, seconds in part.seconds.items():
            clock.seconds[name] += seconds
        getattr(pictures, "skipped", {}).update(part.skipped)
    return report(model, (one for part in parts for one in part.measured), clock, getattr(pictures, "sources", None))


def _build(job: EvalShards) -> Callable[[int], Part]:
    model = job.open_model()
    return partial(_measure, job, model, job.open_pictures(model))


def _measure(job: EvalShards, model: ReducedTransformer, pictures: Data, number: int) -> Part:
    rows = shards_of(len(pictures), SHARD * job.batch_size)[number]
    part = pictures.select(list(rows))  # type: ignore[union-attr]  # no stream comes here
    clock = Clock(next(model.parameters()).device)
    batches = make_batches(part, eval_preprocess(model), job.batch_size, 0, train=False, workers=job.workers)
    with precision(clock.device, job.dtype):
        found = [Measured(one.outcome, one.index_B + rows.start, one.size) for one in outcomes(model, batches, clock)]
    skipped: dict[str, str] = getattr(part, "skipped", {})
    names = set(part.names)
    return Part(found, clock.seconds, {name: why for name, why in skipped.items() if name in names})
