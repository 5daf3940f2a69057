"""`iared2 explain` over many photos on a Ray cluster: the same folder as on one machine, put together from shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from iared2.data.cluster import Cluster, fingerprint, shards_of, stamp, weights_of
from iared2.data.pictures import Failure
from iared2.model import ReducedTransformer
from iared2.output import OutputError
from iared2.report import files, page
from iared2.report.gallery import TIMED, Gallery, GallerySettings, Outcome

SHARD = 8  # batches


@dataclass(frozen=True)
class Photos:
    """Named photos in shards, and the folder that their results go to."""

    names: dict[Path, str]
    side: int
    output: Path
    settings: GallerySettings
    shards: list[range]


Job = tuple[Path, GallerySettings, Cluster]


def explain_sharded(load: Callable[[], ReducedTransformer], paths: Sequence[Path], failed: Sequence[Failure], job: Job) -> Outcome:
    """Explains photos in shards; records of finished ones are in the output folder, under `.shards`.

    Args:
        load: gives the model, here and in every worker.
        failed: sources that were lost before.
        job: the output folder, how to run, and where.
    """
    output, settings, cluster = job
    paths = [path.absolute() for path in paths]
    names = dict(zip(paths, files.unique_names(paths), strict=True))
    shards = shards_of(len(paths), SHARD * settings.batch_size)
    photos = Photos(names, page.thumbnail_side(len(paths)), output.absolute(), settings, shards)
    gallery = Gallery(load(), photos.output, settings)
    facts = gallery.facts()
    key = fingerprint(
        facts.model,
        gallery.model.config.model_dump_json(),
        weights_of(gallery.model.state_dict()),
        facts.settings,
        settings.methods,
        photos.side,
        shards,
        [stamp(path) for path in paths],
    )
    outcome = Outcome(failed=list(failed))
    (photos.output / "manifest.json").unlink(missing_ok=True)  # it promises a finished run
    for part in cluster.run(_build, (load, photos), len(photos.shards), photos.output / ".shards" / key):
        outcome.photos += part.photos
        outcome.failed += part.failed
        outcome.speeds += part.speeds
        outcome.stopped = outcome.stopped or part.stopped
    if outcome.photos:
        gallery.finish(outcome)
    return outcome


def _build(load: Callable[[], ReducedTransformer], photos: Photos) -> Callable[[int], Any]:
    return partial(_explain, Gallery(load(), photos.output, photos.settings), photos)


def _explain(gallery: Gallery, photos: Photos, number: int) -> Outcome:
    outcome, paths = Outcome(), list(photos.names)
    gallery.timed = TIMED if number == 0 else 0  # the dense backbone is timed beside the first photos only
    gallery.work({paths[row]: photos.names[paths[row]] for row in photos.shards[number]}, photos.side, outcome)
    if outcome.stopped:
        raise OutputError(outcome.stopped)  # a shard that is not whole must not be recorded
    return outcome
