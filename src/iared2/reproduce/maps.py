"""What Tables 1 and 5 and the figures stand on: trained models (several are seeds), pictures, and rows of maps against masks."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from iared2.assets import DEFAULT
from iared2.data.cluster import weights_of
from iared2.data.masks import MaskedImages, open_masks
from iared2.errors import ConfigError
from iared2.evaluate.classify import eval_preprocess
from iared2.evaluate.machine import describe_machine, versions
from iared2.evaluate.map_scores import FIGURES
from iared2.evaluate.segment import MapRow, Segmentation, SegmentOptions
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.output import open_folder
from iared2.report.methods import check_limits
from iared2.report.screen import progress
from iared2.reproduce.intervals import half_width
from iared2.runtime import pick_device
from iared2.saving import load_reduced

NO_MEMNET = "No memorability: MemNet's weights are not public in a form that loads here; give yours with --memnet FILE."
Seeds = dict[str, list[MapRow]]  # by method: one row per model, or one where the interpreters do not matter


@dataclass(frozen=True)
class MapsBench:
    """What was asked for.

    Attributes:
        models: embedded models, folders or hub ids; several are seeds of interpreters on one backbone.
        weights: of the backbone, where the models do not hold it.
        data: pictures with masks, a table for each.
        photos: files, folders or patterns.
        memnet: weights of the memorability network.
        limit: a fixed random subset of so many pictures; `slow_limit`: the same for slow methods.
        count: photos on a figure.
    """

    output: Path
    models: tuple[str, ...] = (DEFAULT,)
    weights: Path | None = None
    data: tuple[Path, ...] = ()
    photos: tuple[str, ...] = ()
    memnet: Path | None = None
    limit: int | None = None
    slow_limit: int = 100
    count: int | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 16
    workers: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuses what cannot be done, before anything is done.

        Raises:
            ConfigError: numbers below 1.
        """
        check_limits(self.limit, self.slow_limit)
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--count: got {self.count}, wanted 1 or more")

    def options(self) -> SegmentOptions:
        """How shards are run."""
        return SegmentOptions(self.batch_size, self.workers, self.seed, None, self.dtype, self.slow_limit)

    def open_models(self) -> list[ReducedTransformer]:
        """The models, on their device.

        Raises:
            ConfigError: they are not seeds of one design.
        """
        device = pick_device(self.device)
        found = [load_reduced(name, weights=self.weights, device=device) for name in self.models]
        check_one_design(self.models, found)
        return found

    def open_masks(self) -> dict[str, MaskedImages]:
        """The pictures of each data set by its name, each once, as many as the limit allows.

        Raises:
            DataError: one is none.
        """
        found: dict[str, MaskedImages] = {}
        for path in dict.fromkeys(self.data):
            pictures = open_masks(path)
            name = path.absolute().name
            name = name if name not in found else f"{name} ({len(found) + 1})"
            found[name] = pictures if self.limit is None else pictures.subset(self.limit, self.seed)
        return found

    @property
    def records(self) -> Path:
        """The folder for finished shards."""
        return self.output / ".shards"

    def open_output(self) -> None:
        """Makes the output folder; after what may be wrong with the data, so that a refused run leaves nothing.

        Raises:
            OutputError: it cannot be one.
        """
        open_folder(self.output)


def command(name: str, bench: MapsBench) -> str:
    """The command that makes these results again; folders by their last name."""
    words = [f"iared2 reproduce {name}"]
    words += ["--data " + " ".join(path.absolute().name for path in bench.data)] if bench.data else []
    words += ["--photos " + " ".join(_last(photo) for photo in bench.photos)] if bench.photos else []
    models = " ".join(_last(model) for model in bench.models)
    words += [f"--models {models}" if len(bench.models) > 1 else f"--model {models}"]
    words += [f"--weights {bench.weights.name}"] if bench.weights else []
    words += [f"--memnet {bench.memnet.name}"] if bench.memnet else []
    words += [f"--limit {bench.limit}"] if bench.limit is not None else []
    words += [f"--slow-limit {bench.slow_limit}"] if name == "table1" else []
    words += [f"--count {bench.count}"] if bench.count is not None else []
    words += [f"--dtype {bench.dtype}"] if bench.dtype != "float32" else []
    return " ".join([*words, f"--seed {bench.seed}", "-o OUT"])


def _last(name: str) -> str:
    """A folder by its last name; other names as they are."""
    path = Path(name)
    return path.absolute().name if path.exists() or path.is_absolute() else name


def facts(name: str, bench: MapsBench, model: ReducedTransformer) -> dict[str, Any]:
    """What a JSON file says beside its rows."""
    about: dict[str, Any] = {"name": name, "command": command(name, bench), "models": [_last(one) for one in bench.models]}
    about |= {"limit": bench.limit, "seed": bench.seed, "batch_size": bench.batch_size, "dtype": bench.dtype}
    return about | {"machine": describe_machine(next(model.parameters()).device), "versions": versions()}


def check_one_design(names: Sequence[str], models: Sequence[ReducedTransformer]) -> None:
    """Looks whether figures of these models can be averaged as seeds of one.

    Raises:
        ConfigError: one differs from the first; the message says in what.
    """
    first = _design(models[0])
    for name, model in zip(names[1:], models[1:], strict=True):
        for what, value in _design(model).items():
            if value != first[what]:
                got = f"got {name} with {what} {value}, but {names[0]} has {first[what]}"
                raise ConfigError(f"--models: {got}; give seeds of one design, or make a table for each with --model")


def _design(model: ReducedTransformer) -> dict[str, Any]:
    config = model.config
    return {
        "groups": len(config.first_blocks),
        "first blocks": ", ".join(map(str, config.first_blocks)),
        "place": repr(config.place),
        "blocks": model.adapter.depth,
        "input size": " x ".join(map(str, eval_preprocess(model).size)),
        "classes": model.num_classes,
    }


def shared_backbone(models: Sequence[ReducedTransformer]) -> bool:
    """Whether all models have the same weights in their backbones, so that methods which explain those need one run."""
    return len({weights_of(model.backbone.state_dict()) for model in models}) == 1


def map_rows(bench: MapsBench, models: Sequence[ReducedTransformer], pictures: MaskedImages, methods: Sequence[str]) -> Seeds:
    """Methods against masks: ours once per model, all others once where the models share their backbone.

    Finished shards are remembered in the output folder.
    """
    shared, found = shared_backbone(models), dict[str, list[MapRow]]()
    for number, model in enumerate(models):
        names = [name for name in dict.fromkeys(methods) if number == 0 or not shared or name.startswith("ours")]
        task = Segmentation(model, pictures, find_explainer, bench.options(), bench.records)
        bench.open_output()
        with progress() as bar:
            line = bar.add_task(f"scoring maps, model {number + 1} of {len(models)}", total=task.work(names))
            rows = task.run(names, partial(_advance, bar.advance, line))
        for name, row in zip(names, rows, strict=True):
            found.setdefault(name, []).append(row)
    return found


def _advance(advance: Callable[..., None], line: Any, done: int) -> None:
    advance(line, done)


@dataclass(frozen=True)
class Figure:
    """One figure: its value (a mean over seeds), and its 95 % interval.

    Attributes:
        interval: over pictures where there is one seed, over seeds by Student's t where there are several; None where there is none.
        seeds: how many.
    """

    value: float
    interval: tuple[float, float] | None
    seeds: int = 1

    def text(self, digits: int = 1) -> str:
        """For a cell: with plus and minus over seeds, with both ends over pictures."""
        if not math.isfinite(self.value):
            return "-"
        out = f"{self.value:.{digits}f}"
        if self.interval is None or not all(map(math.isfinite, self.interval)):
            return out
        low, high = self.interval
        return f"{out} ± {(high - low) / 2:.{digits}f}" if self.seeds > 1 else f"{out} ({low:.{digits}f} to {high:.{digits}f})"

    def record(self) -> dict[str, Any]:
        """For JSON; what is not a number is null."""
        ends = None if self.interval is None else [round(end, 4) if math.isfinite(end) else None for end in self.interval]
        return {"value": round(self.value, 4) if math.isfinite(self.value) else None, "interval": ends}


def over_seeds(values: Sequence[float], interval: tuple[float, float] | None) -> Figure:
    """The mean over seeds with its interval by Student's t; of one value that value, with the interval over pictures."""
    if len(values) == 1:
        return Figure(values[0], interval)
    mean, half = statistics.mean(values), half_width(values) or 0.0  # two values or more: there is one
    return Figure(mean, (mean - half, mean + half), len(values))


def figures_of(rows: Sequence[MapRow]) -> dict[str, Figure]:
    """A method's figures from its rows, one per seed, by the names in `FIGURES`; empty where there are none."""
    if any(row.why is not None for row in rows):
        return {}
    return {name: over_seeds([row.raw[name] for row in rows], rows[0].raw_intervals[name]) for name in FIGURES}
