"""From photos to a folder one can open: pictures and raw maps per photo, one page, and a manifest written last."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from iared2 import output
from iared2.data.pictures import Failure, Picture, read_picture, show
from iared2.errors import DataError
from iared2.explain import Explanation, Speed, explain, measure
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.report import files, page, pictures, records, viewer
from iared2.runtime import pick_device, precision
from iared2.saving import sha256

PIXELS_AT_ONCE = 120_000_000  # decoded pixels that a batch may hold
TIMED = 64  # photos on which the dense backbone runs too, for comparison


@dataclass(frozen=True)
class GallerySettings:
    """How to run.

    Attributes:
        workers: threads that read and draw; 0 does both in turn with the model.
        methods: explainers whose maps stand side by side on one sheet per photo.
    """

    model: str
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16
    workers: int = 2
    seed: int = 0
    methods: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        failed: files that could not be read.
        stopped: why the run ended early, if it did.
    """

    photos: list[records.PhotoRecord] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    stopped: str | None = None

    @property
    def exit_code(self) -> int:
        """0: all is well; 1: something failed; 2: nothing could be done."""
        if not self.photos:
            return 2
        return 1 if self.failed or self.stopped else 0


@dataclass(frozen=True)
class Preparation:
    """How a photo becomes an input: squeezed as a whole, then normalised."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @classmethod
    def of(cls, model: ReducedTransformer) -> "Preparation":
        """What timm's data configuration says, at the size the positions were made for."""
        data = timm.data.resolve_model_data_config(model)
        size = getattr(model.backbone.patch_embed, "img_size", None) or data["input_size"][1:]
        return cls(tuple(size), tuple(data["mean"]), tuple(data["std"]), data["interpolation"])

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        resample = getattr(Image.Resampling, self.interpolation.upper(), Image.Resampling.BICUBIC)
        small = np.asarray(image.resize(self.size[::-1], resample), np.float32) / 255
        normal = (small - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(normal.transpose(2, 0, 1).copy())


class Gallery:
    """One run over photos into one folder. Files that cannot be read are noted; what is done stays done."""

    def __init__(self, model: ReducedTransformer, output: Path, settings: GallerySettings) -> None:
        self.model, self.output, self.settings = model, output, settings
        self.device = pick_device(settings.device)
        self.prepare = Preparation.of(model)
        self.timed = TIMED
        self.explainers = [find_explainer(name, model, settings.seed) for name in settings.methods]

    def run(self, paths: Sequence[Path], done: Callable[[Path], None] = lambda _: None, failed: Iterable[Failure] = ()) -> Outcome:
        """Explains the photos, writing as it goes.

        Args:
            done: called once for every path, whatever became of it.
            failed: sources that were lost before; they join the list.
        """
        outcome = Outcome(failed=list(failed))
        self.work(dict(zip(paths, files.unique_names(paths), strict=True)), page.thumbnail_side(len(paths)), outcome, done)
        if outcome.photos:
            self.finish(outcome)
        return outcome

    def work(self, names: dict[Path, str], side: int, outcome: Outcome, done: Callable[[Path], None] = lambda _: None) -> None:
        """Explains photos, each under its name, without the page and the manifest.

        Args:
            side: of thumbnails, in pixels.
            outcome: takes what comes of it.
        """
        paths = list(names)
        with ThreadPoolExecutor(max(1, self.settings.workers)) as pool:
            try:
                readable = self._readable(_read_ahead(paths, pool, self.settings.workers), outcome, done)
                for batch in _batches(readable, self.settings.batch_size):
                    self._clear_manifest(outcome)
                    explanations, speed = self._look(batch, outcome)
                    looks = zip(batch, explanations, self._compare(batch), strict=True)
                    drawn = [pool.submit(self._draw, p, names[p.path], (e, m), speed, side) for p, e, m in looks]
                    _collect(drawn, outcome)
                    for picture in batch:
                        done(picture.path)
                    if outcome.stopped:
                        break
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)  # what is being drawn is finished, the rest is not begun
                raise

    def _clear_manifest(self, outcome: Outcome) -> None:
        """Before the first photo is written: a manifest promises a finished run."""
        if not outcome.photos:
            with suppress(OSError):
                (self.output / "manifest.json").unlink(missing_ok=True)

    def _readable(self, reads: Iterable[Picture | Failure], outcome: Outcome, done: Callable[[Path], None]) -> Iterator[Picture]:
        for read in reads:
            if isinstance(read, Failure):
                outcome.failed.append(read)
                done(read.path)
            else:
                yield read

    def _look(self, batch: Sequence[Picture], outcome: Outcome) -> tuple[list[Explanation], Speed | None]:
        """One forward pass; for the first photos also the dense backbone's, to compare."""
        images = torch.stack([self.prepare(picture.image) for picture in batch]).to(self.device)
        with precision(self.device, self.settings.dtype):
            explanations = explain(self.model, images)
            if sum(speed.images for speed in outcome.speeds) >= self.timed:
                return explanations, None
            speed = measure(self.model, images)
        outcome.speeds.append(speed)
        return explanations, speed

    def _compare(self, batch: Sequence[Picture]) -> list[dict[str, Float[np.ndarray, "_h _w"]]]:
        """For each photo the maps of the methods asked for, as they are."""
        found: list[dict[str, np.ndarray]] = [{} for _ in batch]
        if self.explainers:
            images = torch.stack([self.prepare(picture.image) for picture in batch]).to(self.device)
            with precision(self.device, self.settings.dtype):
                for explainer in self.explainers:
                    for place, values in zip(found, explainer(images).cpu().numpy(), strict=True):
                        place[explainer.name] = values
        return found

    def _draw(
        self, picture: Picture, name: str, look: tuple[Explanation, dict[str, np.ndarray]], speed: Speed | None, side: int
    ) -> records.PhotoRecord:
        """Writes all files of one photo, or none."""
        folder, written = self.output / name, []
        explanation, maps = look
        trace, photo = explanation.trace, picture.image
        kept = trace.keep_GBN[:, 0].reshape(-1, *trace.grid).numpy()
        paths: dict[str, Any] = {"overlays": [], "scores": []}
        embedded: dict[str, Any] = {"photo": page.thumbnail(photo, side), "overlays": [], "kept": []}
        embedded["numbers"] = viewer.numbers(explanation, maps, page.shows_heads(side))
        small = pictures.panel(photo)

        def put(file: str, content: bytes) -> str:
            written.append(output.write(folder / file, content))
            return f"{name}/{file}"

        try:
            _make_folder(folder)
            for group in range(trace.groups):
                scores = trace.heatmap(group)[0].float().numpy()
                overlay = pictures.overlay(photo, scores)
                paths["overlays"].append(put(f"overlay_group{group + 1}.png", files.png(overlay)))
                paths["scores"].append(put(f"scores_group{group + 1}.npy", files.npy(scores)))
                embedded["overlays"].append(page.thumbnail(overlay, side))
                embedded["kept"].append(page.thumbnail(pictures.faded(small, kept[group]), side))
            paths["kept"] = put("kept.npy", files.npy(kept))
            paths["carriers"] = put("carriers.npy", files.npy(trace.carrier_GBN[:, 0].reshape(-1, *trace.grid).numpy()))
            if explanation.head_GHN is not None:
                paths["heads"] = put("heads.npy", files.npy(explanation.head_GHN.unflatten(-1, trace.grid).numpy()))
            paths["hierarchy"] = put("hierarchy.png", files.png(pictures.hierarchy(photo, list(kept))))
            if maps:
                paths["methods"] = {id_: put(_map_file(id_), files.npy(values)) for id_, values in maps.items()}
                paths["methods_sheet"] = put("methods.png", files.png(pictures.side_by_side(photo, maps)))
        except output.OutputError:
            _remove(written, folder)
            raise
        return records.picture_record(picture, name, explanation, speed, (paths, embedded))

    def finish(self, outcome: Outcome) -> None:
        """The page, and last of all the manifest."""
        facts, speed = self.facts(), records.mean_speed(outcome.speeds)
        try:
            output.write(self.output / "index.html", page.render(facts, outcome.photos, outcome.failed, speed).encode("utf-8"))
            manifest = records.manifest(facts, outcome.photos, outcome.failed, speed)
            output.write(self.output / "manifest.json", json.dumps(manifest, indent=2, allow_nan=False).encode("ascii") + b"\n")
        except output.OutputError as error:
            outcome.stopped = outcome.stopped or str(error)

    def facts(self) -> records.RunFacts:
        """What holds for every photo of this run."""
        model, config, how = self.model, self.model.config, self.prepare
        return records.RunFacts(
            model={
                "name": Path(self.settings.model).name if Path(self.settings.model).is_dir() else self.settings.model,
                "architecture": (model.pretrained_cfg or {}).get("architecture"),
                "classes": model.num_classes,
                "groups": len(config.first_blocks),
                "first_blocks": list(config.first_blocks),
                "rule": config.rule,
                "thresholds": config.model_dump(mode="json")["thresholds"] or [0.5] * len(config.first_blocks),
                "ratios": list(config.ratios),
                "on_drop": config.on_drop,
                "merged_by": config.weights,
                "worth": config.worth is not None,
                "second_look": config.second_look,
            },
            weights=tuple(records.Weights(f"{path.parent.name}/{path.name}", sha256(path)) for path in getattr(model, "files", ())),
            preprocessing={
                "height": how.size[0],
                "width": how.size[1],
                "resize": "squeeze",
                "crop": None,
                "what": records.SQUEEZED,
                "interpolation": how.interpolation,
                "mean": list(how.mean),
                "std": list(how.std),
            },
            settings={
                "device": str(self.device),
                "dtype": self.settings.dtype,
                "batch_size": self.settings.batch_size,
                "workers": self.settings.workers,
                "seed": self.settings.seed,
                "threads": torch.get_num_threads(),
            },
        )


def _map_file(method: str) -> str:
    """A detail behind a colon may be a path."""
    return "map_" + "".join(letter if letter.isalnum() else "_" for letter in method) + ".npy"


def _read(path: Path) -> Picture | Failure:
    try:
        return read_picture(path)
    except DataError as error:
        return Failure(path, str(error))


def _read_ahead(paths: Sequence[Path], pool: ThreadPoolExecutor, ahead: int) -> Iterator[Picture | Failure]:
    """Reads in order, a few files ahead of who asks."""
    waiting: deque[Future[Picture | Failure]] = deque()
    for path in paths:
        if not ahead:
            yield _read(path)
            continue
        waiting.append(pool.submit(_read, path))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(items: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Groups of at most `size` pictures and about `PIXELS_AT_ONCE` pixels."""
    batch: list[Picture] = []
    pixels = 0
    for item in items:
        batch.append(item)
        pixels += item.image.width * item.image.height
        if len(batch) == size or pixels >= PIXELS_AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _collect(drawn: Sequence[Future[records.PhotoRecord]], outcome: Outcome) -> None:
    for future in drawn:
        try:
            outcome.photos.append(future.result())
        except output.OutputError as error:
            outcome.stopped = outcome.stopped or str(error)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise output.OutputError(f"{show(folder)}: cannot be made ({error.strerror})") from None


def _remove(written: Sequence[Path], folder: Path) -> None:
    for path in written:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
