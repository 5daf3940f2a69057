"""What is written about a run: one record per photo, and the manifest over all of them."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import iared2
from iared2.data.pictures import Failure, Picture, show
from iared2.explain import Explanation, Speed

SCHEMA = 1
SQUEEZED = "the whole photo is squeezed to the input size; nothing is cropped, and proportions change"

AGAIN = "unsure after one pass: the answer is that of a second one, with nothing dropped; the maps are the first's"


@dataclass(frozen=True)
class Weights:
    """A file the model was made from."""

    file: str
    sha256: str


@dataclass(frozen=True)
class RunFacts:
    """What holds for all photos of a run.

    Attributes:
        model: name, architecture, groups and settings of the model.
        weights: the files it came from.
        preprocessing: how a photo becomes an input.
        settings: device, dtype, batch size, workers, seed.
    """

    model: dict[str, Any]
    weights: tuple[Weights, ...]
    preprocessing: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class PhotoRecord:
    """One photo: what was found, and the files that show it (relative to the output folder).

    Attributes:
        embedded: what the page holds of it: pictures as data URIs, and the numbers of its patches.
    """

    name: str
    file: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    explanation: Explanation
    speed: Speed | None
    files: dict[str, Any]
    embedded: dict[str, Any] = field(repr=False)

    @property
    def title(self) -> str:
        """The file's own name, for people."""
        return self.file.replace("\\", "/").rsplit("/", 1)[-1]

    @property
    def keep_ratio(self) -> list[float]:
        """Kept patches / all patches after each group."""
        return [round(value, 6) for value in self.explanation.trace.keep_ratio[0].tolist()]

    @property
    def macs_share(self) -> float:
        """Multiply-adds of this photo as a share of the dense backbone's."""
        return self.explanation.trace.share_of_dense()

    def as_json(self) -> dict[str, Any]:
        """The photo's entry in the manifest."""
        trace = self.explanation.trace
        kept = trace.keep_GBN[:, 0].sum(-1).tolist()
        groups = [
            {"group": group + 1, "first_block": trace.first_blocks[group], "kept": kept[group], "patches": trace.keep_GBN.shape[-1]}
            | {
                "keep_ratio": ratio,
                "macs": self.explanation.macs_G[group],
                "overlay": self.files["overlays"][group],
                "scores": self.files["scores"][group],
            }
            for group, ratio in enumerate(self.keep_ratio)
        ]
        speed = None if self.speed is None else {"reduced": self.speed.reduced_ms, "dense": self.speed.dense_ms}
        return {
            "file": self.file,
            "name": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "notes": list(self.notes),
            "predictions": [asdict(prediction) for prediction in self.explanation.predictions],
            "keep_ratio": self.keep_ratio,
            "groups": groups,
            "hierarchy": self.files["hierarchy"],
            "kept": self.files["kept"],
            "carriers": self.files["carriers"],
            "heads": self.files.get("heads"),
            "methods": self.files.get("methods", {}),
            "methods_sheet": self.files.get("methods_sheet"),
            "macs": trace.macs[0],
            "dense_macs": trace.dense_macs,
            "macs_share": round(self.macs_share, 6),
            "looked_again": any(trace.again),
            "milliseconds": speed,
        }


def picture_record(picture: Picture, name: str, explanation: Explanation, speed: Speed | None, written: tuple[dict, dict]) -> PhotoRecord:
    """The record of a photo, of which `written` = (paths of files, what the page holds). Scores per head are in a file: they are let go."""
    notes = (*picture.notes, AGAIN) if any(explanation.trace.again) else picture.notes
    return PhotoRecord(name, show(picture.path), picture.size, notes, replace(explanation, head_GHN=None), speed, *written)


def mean_speed(speeds: Sequence[Speed]) -> Speed | None:
    """The mean over measured batches, each counting as often as it has photos."""
    images = sum(speed.images for speed in speeds)
    if not images:
        return None
    reduced = sum(speed.reduced_ms * speed.images for speed in speeds) / images
    return Speed(reduced, sum(speed.dense_ms * speed.images for speed in speeds) / images, images)


def manifest(facts: RunFacts, photos: Sequence[PhotoRecord], failed: Sequence[Failure], speed: Speed | None) -> dict[str, Any]:
    """The whole run as plain data."""
    timing = None
    if speed is not None:
        timing = {
            "milliseconds": {"reduced": speed.reduced_ms, "dense": speed.dense_ms},
            "photos": speed.images,
            "how": "per photo, in batches; reduced model and dense backbone in turn in one process, median of 3 rounds after a warm-up",
        }
    return {
        "schema_version": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "model": facts.model,
        "weights": [asdict(weights) for weights in facts.weights],
        "preprocessing": facts.preprocessing,
        "settings": facts.settings,
        "timing": timing,
        "photos": [photo.as_json() for photo in photos],
        "failed": [{"file": show(failure.path), "reason": failure.reason} for failure in failed],
    }


def versions() -> dict[str, str]:
    """Versions of this library and of those that decide its results."""
    found = {"iared2": iared2.__version__, "python": platform.python_version()}
    for package in ("torch", "timm", "pillow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
