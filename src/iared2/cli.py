"""The command line. The only place that configures logging and catches errors.

Exit codes: 0 all is well; 1 some files failed (training leaves them out and says so); 2 nothing could be done, or the command is
wrong; 70 a defect of ours; 130 interrupted.
"""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape

from iared2 import __version__
from iared2.assets import DEFAULT
from iared2.errors import ConfigError, DataError, IARED2Error
from iared2.report.screen import complain, progress, screen, tell

if TYPE_CHECKING:
    from iared2.data.cluster import Cluster
    from iared2.model import ReducedTransformer

NOTHING_DONE, DEFECT, INTERRUPTED = 2, 70, 130

app = App(
    name="iared2",
    version=__version__,
    help="Vision transformers that drop, per image, the patches that do not matter, and show which ones did.",
    help_epilogue="Start with: iared2 explain -p PHOTO -o OUT, then open OUT/index.html.",
    help_format="plaintext",
    version_format="plaintext",
    suppress_keyboard_interrupt=False,  # main says one line
)

OnDropChoice = Literal["discard", "merge", "fuse"]
DtypeChoice = Literal["float32", "bfloat16", "float16"]
Threshold = Annotated[float | None, Parameter(help="Keep patches whose score is above this; -1 keeps all. Default: the model's own.")]
OnDropOption = Annotated[OnDropChoice | None, Parameter(help="What becomes of dropped patches. Default: the model's own choice.")]
WeightsOption = Annotated[Path | None, Parameter(help="A safetensors file with the backbone's weights.")]
ModelOption = Annotated[str, Parameter(name=["--model", "-m"], help="Embedded model, model folder or hub id; see `iared2 models`.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options that every command takes."""

    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    dtype: Annotated[DtypeChoice, Parameter(help="Precision of matrix products.")] = "float32"
    batch_size: Annotated[int | None, Parameter(help="Images per forward pass. Default: the command's own.")] = None
    workers: Annotated[int, Parameter(help="Threads or processes that read files.")] = min(4, os.cpu_count() or 1)
    seed: Annotated[int | None, Parameter(help="Seed of every random choice. Default: 0, or the recipe's.")] = None
    debug: Annotated[bool, Parameter(negative="", help="Show tracebacks.")] = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size: got {self.batch_size}, wanted 1 or more")
        if self.workers < 0:
            raise ConfigError(f"--workers: got {self.workers}, wanted 0 or more")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"--seed: got {self.seed}, wanted 0 or more")


_COMMON = Common()


@Parameter(name="*")
@dataclass(frozen=True)
class TrainCommon(Common):
    """The same for training, where a recipe has a precision of its own."""

    dtype: Annotated[DtypeChoice | None, Parameter(help="Precision of matrix products. Default: the recipe's.")] = None  # type: ignore[assignment]


_TRAIN_COMMON = TrainCommon()


@Parameter(name="*")
@dataclass(frozen=True)
class MapsCommon(Common):
    """The same where some tables take no precision at all, and must know whether one was given."""

    dtype: Annotated[DtypeChoice | None, Parameter(help="Precision of matrix products. Default: float32.")] = None  # type: ignore[assignment]


_MAPS_COMMON = MapsCommon()


@Parameter(name="*")
@dataclass(frozen=True)
class OnRay:
    """Options of commands that can share their files out to a cluster."""

    ray: Annotated[
        bool, Parameter(negative="", help="Share the work out to a Ray cluster; finished shards are kept and not done again.")
    ] = False
    ray_address: Annotated[
        str | None, Parameter(help="A running cluster: auto, HOST:PORT or ray://HOST:10001. Default: one on this machine.")
    ] = None

    def cluster(self, device: str) -> "Cluster | None":
        """Where to work; None: here."""
        if not self.ray and self.ray_address is None:
            return None
        from iared2.data.cluster import Cluster
        from iared2.runtime import pick_device

        return Cluster(self.ray_address, gpus=float(pick_device(device).type == "cuda"))


_ON_RAY = OnRay()


def _several(long: str, short: str, help: str) -> Parameter:  # noqa: A002 - cyclopts's word
    """An option that takes one path or more."""
    return Parameter(name=[long, short], consume_multiple=True, negative="", metavar="PATH", help=help)


# ---- explain --------------------------------------------------------------------------------------------------


@app.command
def explain(
    *,
    photos: Annotated[
        list[str] | None,
        _several("--photos", "-p", "Photos, folders (with sub-folders) or glob patterns."),
    ] = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Folder for the results.")] = None,
    method: Annotated[str, Parameter(help="Explainers side by side on one sheet per photo, such as ours,rollout,chefer.")] = "",
    list_methods: Annotated[bool, Parameter(negative="", help="List the explainers and stop.")] = False,
    model: ModelOption = DEFAULT,
    weights: WeightsOption = None,
    threshold: Threshold = None,
    on_drop: OnDropOption = None,
    on_ray: OnRay = _ON_RAY,
    common: Common = _COMMON,
) -> int:
    """Show what the model looked at in photos, and what it dropped group by group.

    Writes heatmaps, the paper's Figure 4, raw maps, a page (index.html) and, last, manifest.json.
    """
    from iared2.data.pictures import find_pictures
    from iared2.explain.methods import check_names
    from iared2.output import open_folder
    from iared2.report.gallery import Gallery, GallerySettings
    from iared2.seeds import seed_all

    if list_methods:
        return _list_methods()
    if output is None:
        raise ConfigError("--output: nothing was given; name a folder for the results with -o OUT")
    methods = check_names([name.strip() for name in method.split(",") if name.strip()], "--method")
    paths, failed = find_pictures(photos or [])
    if not paths:
        nothing = "--photos: nothing was given; name photos, a folder or a pattern"
        raise DataError("; ".join(failure.reason for failure in failed) or nothing)
    open_folder(output)
    seed_all(common.seed or 0)
    settings = GallerySettings(model, common.device, common.dtype, common.batch_size or 16, common.workers, common.seed or 0, methods)
    load = partial(_load, model, weights, threshold, on_drop, common.device)
    cluster = on_ray.cluster(common.device)
    if cluster is not None:
        from iared2.report.sharded import explain_sharded

        return tell(explain_sharded(load, paths, failed, (output, settings, cluster)), output, len(paths))
    gallery = Gallery(load(), output, settings)
    with progress() as bar:
        task = bar.add_task("explaining", total=len(paths))
        outcome = gallery.run(paths, lambda _: bar.advance(task), failed)
    return tell(outcome, output, len(paths))


def _list_methods() -> int:
    from rich.table import Table

    from iared2.explain.methods import method_list

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name, about in method_list():
        table.add_row(escape(name), escape(about))
    screen().print(table)
    return 0


def _load(name: str, weights: Path | None, threshold: float | None, on_drop: OnDropChoice | None, device: str) -> "ReducedTransformer":
    """The model as the options want it."""
    from iared2.runtime import pick_device
    from iared2.saving import load_reduced

    if threshold is not None and math.isnan(threshold):
        raise ConfigError("--threshold: got nan, wanted a number; -1 keeps all patches")
    loaded = load_reduced(name, weights=weights, device=pick_device(device))
    if threshold is not None:
        loaded.threshold = threshold
    if on_drop is not None:
        loaded.configure(on_drop=on_drop)
    return loaded


# ---- models ---------------------------------------------------------------------------------------------------


@app.command
def models(*, check: bool = False, weights: Path | None = None, common: Common = _COMMON) -> int:
    """List the embedded models, and say what else can be loaded.

    Parameters
    ----------
    check
        Have each embedded model prove itself with its golden tensors.
    weights
        A weights file for backbones that are not embedded (with --check).
    """
    del common
    from rich.table import Table

    from iared2 import assets

    console = screen()
    if check:
        return _check_models(console, weights)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("embedded model", no_wrap=True)
    for heading in ("size", "classes", "top-1", "MACs", "backbone's weights"):
        table.add_column(heading, justify="left" if "back" in heading else "right")
    for name in assets.embedded():
        table.add_row(*_model_row(name))
    console.print(table if table.row_count else "No model is embedded in this copy of the package.")
    console.print(
        "\n--model also takes a folder that `save_pretrained` wrote, and the id of such a model on the Hugging Face hub.\n"
        "Where the weights of the backbone are not included, they come from the hub (timm), or from a safetensors\n"
        "file with --weights FILE; then no network is needed.",
        soft_wrap=True,
    )
    return 0


def _check_models(console: Console, weights: Path | None) -> int:
    """Loads every embedded model and compares it with its golden tensors."""
    from iared2 import assets
    from iared2.golden import check_golden
    from iared2.saving import load_reduced

    failed = 0
    for name in assets.embedded():
        try:
            included = (assets.HERE / name / "backbone.safetensors").is_file()
            worst = check_golden(load_reduced(name, weights=None if included else weights), assets.HERE / name)
            console.print(f"{name}: agrees with its golden tensors to {worst:.1g}", soft_wrap=True)
        except IARED2Error as error:
            failed += 1
            console.print(f"{name}: {error}", soft_wrap=True)
    return 2 if failed and failed == len(assets.embedded()) else int(failed > 0)


def _model_row(name: str) -> list[str]:
    from iared2 import assets

    folder = assets.HERE / name
    config = json.loads((folder / "config.json").read_text())
    metrics, backbone = config.get("metrics") or {}, config["backbone"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    top1, macs, dense = metrics.get("top1"), metrics.get("macs"), metrics.get("dense_macs")
    cost = "" if macs is None else f"{macs / 1e9:.3g} G" + (f" ({100 * macs / dense:.0f} %)" if dense else "")
    mark = " (default)" if name == DEFAULT else ""
    included = "included" if backbone["included"] else "hub or --weights FILE"
    classes, accuracy = str(backbone["arguments"].get("num_classes", "")), f"{top1:.1f} %" if top1 else ""
    return [escape(name) + mark, f"{size:.1f} MB", classes, accuracy, cost, included]


# ---- eval and train -------------------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    *,
    data: Annotated[Path, Parameter(name=["--data", "-d"], help="One folder per class, or a folder with labels.csv (file, class_index).")],
    model: ModelOption = DEFAULT,
    weights: WeightsOption = None,
    threshold: Threshold = None,
    on_drop: OnDropOption = None,
    json_file: Annotated[Path | None, Parameter(name="--json", help="Also write the table as JSON.")] = None,
    limit: Annotated[int | None, Parameter(help="Use only this many images.")] = None,
    on_ray: OnRay = _ON_RAY,
    common: Common = _COMMON,
) -> int:
    """Measure accuracy, kept patches, MACs and speed, with the dense backbone beside it."""
    from iared2.evaluate.classify import run_eval

    return run_eval(
        model,
        data,
        weights=weights,
        threshold=threshold,
        on_drop=on_drop,
        json_file=json_file,
        device=common.device,
        dtype=common.dtype,
        batch_size=common.batch_size or 64,
        workers=common.workers,
        seed=common.seed or 0,
        limit=limit,
        cluster=on_ray.cluster(common.device),
    )


@app.command
def segment(
    *,
    data: Annotated[Path, Parameter(name=["--data", "-d"], help="A folder with images/ and masks/ (and ignore/), or gtsegs_ijcv.mat.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the tables; an unfinished run there goes on.")],
    methods: Annotated[str, Parameter(help="Names separated by commas, or all.")] = "background,random,gaussian,ours",
    model: ModelOption = DEFAULT,
    weights: WeightsOption = None,
    threshold: Threshold = None,
    on_drop: OnDropOption = None,
    target: Annotated[int | None, Parameter(help="The class to explain. Default: the one the model names for each image.")] = None,
    json_file: Annotated[Path | None, Parameter(name="--json", help="Also write the JSON file here.")] = None,
    limit: Annotated[int | None, Parameter(help="Use only this many images, a fixed random subset.")] = None,
    slow_limit: Annotated[int, Parameter(help="The same for slow methods.")] = 100,
    common: Common = _COMMON,
) -> int:
    """Score methods by how well their maps find objects: weakly supervised segmentation against masks.

    Writes OUT/segment.md, .csv, .tex and .json.
    """
    from iared2.evaluate.segment import SegmentOptions
    from iared2.report.methods import Request, choose_methods
    from iared2.report.segment import run_segment

    names = choose_methods(methods)
    seed = common.seed or 0
    options = SegmentOptions(common.batch_size or 16, common.workers, seed, target, common.dtype, slow_limit)
    request = Request(data, names, output, limit, json_file, _asked(model, weights, seed))
    return run_segment(_load(model, weights, threshold, on_drop, common.device), request, options)


def _asked(model: str, weights: Path | None, seed: int) -> dict[str, Any]:
    """What a JSON file says of the command that made it."""
    return {"model": model, "weights": None if weights is None else str(weights), "seed": seed}


@app.command
def faithfulness(
    *,
    data: Annotated[Path, Parameter(name=["--data", "-d"], help="Pictures, as for eval; without labels if --target needs none.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the tables; an unfinished run there goes on.")],
    methods: Annotated[str, Parameter(help="Names separated by commas, or all; random is always added.")] = "random,gaussian,ours",
    tests: Annotated[str, Parameter(help="zero, tokens, road, blur, saco, gini, randomised; separated by commas, or all.")] = "all",
    model: ModelOption = DEFAULT,
    weights: WeightsOption = None,
    threshold: Threshold = None,
    on_drop: OnDropOption = None,
    target: Annotated[str, Parameter(help="The class to explain: predicted, label, or a number.")] = "predicted",
    json_file: Annotated[Path | None, Parameter(name="--json", help="Also write the JSON file here.")] = None,
    limit: Annotated[int, Parameter(help="Use only this many images, a fixed random subset.")] = 200,
    slow_limit: Annotated[int, Parameter(help="The same for slow methods.")] = 20,
    common: Common = _COMMON,
) -> int:
    """Score methods by what becomes of the model's answer when what their maps call important is removed.

    Writes OUT/faithfulness.md, .csv, .tex and .json, and OUT/curves.json and .png.
    """
    from iared2.evaluate.faithful_run import FaithOptions
    from iared2.report.faithfulness import choose_target, choose_tests, run_faithfulness
    from iared2.report.methods import Request, choose_methods

    names, chosen = choose_methods(methods), choose_tests(tests)
    seed = common.seed or 0
    options = FaithOptions(common.batch_size or 16, common.workers, seed, choose_target(target), common.dtype, slow_limit, chosen)
    request = Request(data, names, output, limit, json_file, _asked(model, weights, seed))
    return run_faithfulness(_load(model, weights, threshold, on_drop, common.device), request, options)


@app.command
def calibrate(
    *,
    data: Annotated[Path, Parameter(name=["--data", "-d"], help="A few hundred pictures; labels are not needed.")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the model with its new thresholds.")],
    target_macs: Annotated[str | None, Parameter(help="A budget per image: 0.65x, 65%, 0.8G, 800M, or 9ms on this device.")] = None,
    disagreement: Annotated[float | None, Parameter(help="Instead: percent of pictures that may get another class than dense.")] = None,
    second_look: Annotated[
        float, Parameter(help="Share of pictures to pass again with nothing dropped, those least sure of; 0 takes a second look away.")
    ] = 0.0,
    model: ModelOption = DEFAULT,
    weights: WeightsOption = None,
    limit: Annotated[int, Parameter(help="Use only this many images.")] = 256,
    common: Common = _COMMON,
) -> int:
    """Choose thresholds for a budget, or for an allowed disagreement with the dense model, without training."""
    from iared2.evaluate.calibration import CalibrationOptions, Wish, run_calibration

    batch_size, seed = common.batch_size or 32, common.seed or 0
    options = CalibrationOptions(weights, limit, batch_size, common.workers, common.device, common.dtype, seed)
    return run_calibration(model, data, output, Wish(target_macs, disagreement, second_look), options)


@app.command
def train(
    recipe: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, help="Name of a recipe; without one, the recipes are listed.")
    ] = None,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, help="Settings of the recipe, such as reward.error_penalty=1.")],
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Folder of the run; an unfinished run there goes on.")] = None,
    data: Annotated[Path | None, Parameter(name=["--data", "-d"], help="Training data, where the recipe names none.")] = None,
    weights: WeightsOption = None,
    model: Annotated[str | None, Parameter(name=["--model", "-m"], help="A timm model, where the recipe's is not wanted.")] = None,
    target_macs: Annotated[str | None, Parameter(help="A budget per image: 0.65x, 65%, 0.8G, 800M, or 9ms on this device.")] = None,
    start: Annotated[str | None, Parameter(help="A reduced model to go on from to a budget: a folder, embedded name or hub id.")] = None,
    common: TrainCommon = _TRAIN_COMMON,
) -> int:
    """Train by a recipe (Algorithm 1), or to a budget: --target-macs 0.65x. Any field can be changed: --data.batch_size=64."""
    if recipe is None and target_macs is None and start is None:
        return _list_recipes()
    from iared2.train.run import run_recipe

    if recipe is not None and recipe.startswith("--") and "=" not in recipe:
        raise ConfigError(f"Unknown option: {recipe}; see iared2 train --help")
    if recipe is not None and (target_macs or start) is not None and "=" in recipe:  # with a budget no recipe need be named
        overrides, recipe = (recipe, *overrides), None
    changes = [] if target_macs is None else [f"together.target={json.dumps(target_macs)}"]
    changes += [] if model is None else [f"backbone.model={json.dumps(model)}"]
    changes += [] if start is None else [f"together.start={json.dumps(start)}"]
    changes += overrides
    if common.batch_size is not None:
        changes.append(f"data.batch_size={common.batch_size}")
    return run_recipe(
        recipe or "budget",
        changes,
        output=output,
        data=data,
        weights=weights,
        device=common.device,
        dtype=common.dtype,
        workers=common.workers,
        seed=common.seed,
    )


def _list_recipes() -> int:
    from rich.table import Table

    from iared2.train.recipes import RECIPES

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does, what it costs, what comes out", overflow="fold")
    for name, factory in RECIPES.items():
        text = " ".join(line.strip() for line in (factory.__doc__ or "").strip().splitlines())
        table.add_row(escape(name), escape(text))
    screen().print(table, "\nRun one: iared2 train RECIPE --data FOLDER -o RUN", soft_wrap=False)
    return 0


# ---- reproduce ------------------------------------------------------------------------------------------------


@app.command
def reproduce(
    table: Annotated[
        str,
        Parameter(
            help="Trained here: table6, table7, table8, groups, gumbel, variance. Of trained models: table1, table5, figure3, figure4, "
            "figure6, figure7."
        ),
    ],
    *,
    data: Annotated[
        list[Path] | None,
        _several(
            "--data",
            "-d",
            "Trained here: Tiny-ImageNet-200 (small), or ImageNet-1k (paper). Else folders with images/ and masks/, gtsegs_ijcv.mat, "
            "or Tiny-ImageNet-200 (its boxes): table1, table5, and the numbers of figure4 and figure7.",
        ),
    ] = None,
    photos: Annotated[
        list[str] | None,
        _several(
            "--photos",
            "-p",
            "Figures: photos, folders or patterns, of which some are chosen at random. table5: one folder of labelled photos.",
        ),
    ] = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="Folder for the results; what is finished there is kept.")] = Path(
        "runs/reproduce"
    ),
    scale: Annotated[
        Literal["small", "paper"] | None, Parameter(help="Trained here: what two CPU cores manage, or the paper's. Default: small.")
    ] = None,
    seeds: Annotated[int | None, Parameter(help="Trained here: how many seeds, from 0 on. Default: 1.")] = None,
    images: Annotated[int | None, Parameter(help="Trained here, small: training pictures, a fixed random subset. Default: 5000.")] = None,
    val_images: Annotated[int | None, Parameter(help="Trained here: validation pictures, a fixed random subset. Default: all.")] = None,
    model: Annotated[
        str | None, Parameter(name=["--model", "-m"], help=f"Embedded model, model folder or hub id. Default: {DEFAULT}.")
    ] = None,
    models: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, negative="", help="table1, table5, figure4, figure7: several seeds of interpreters, as --model."),
    ] = None,
    weights: WeightsOption = None,
    memnet: Annotated[
        Path | None, Parameter(help="table1, figure3, figure6: weights of the memorability network; without them its row is empty.")
    ] = None,
    limit: Annotated[int | None, Parameter(help="Use only this many pictures with masks or labels, a fixed random subset.")] = None,
    slow_limit: Annotated[int | None, Parameter(help="table1: the same for slow methods. Default: 100.")] = None,
    count: Annotated[int | None, Parameter(help="Figures: photos on the sheet. Default: the figure's own.")] = None,
    common: MapsCommon = _MAPS_COMMON,
) -> int:
    """Make a table or a figure of the paper again, the paper's numbers beside ours.

    Writes OUT/TABLE.json and OUT/TABLE.md, and OUT/TABLE.png where there is something to see. What was finished is not done again.
    """
    from iared2.reproduce.options import TRAINED, check_options

    asked: dict[str, Any] = {
        "data": data,
        "photos": photos,
        "scale": scale,
        "seeds": seeds,
        "images": images,
        "val_images": val_images,
        "model": model,
    }
    asked |= {"models": models, "weights": weights, "memnet": memnet, "limit": limit, "slow_limit": slow_limit, "count": count}
    asked |= {"seed": common.seed, "dtype": common.dtype, "batch_size": common.batch_size}
    given = {name: value for name, value in asked.items() if value is not None}
    check_options(table, {name.replace("_", "-"): value for name, value in given.items()})
    return (_reproduce_trained if table in TRAINED else _reproduce_maps)(table, output, given, common)


def _reproduce_trained(table: str, output: Path, given: dict[str, Any], common: Common) -> int:
    """Tables whose models are trained by the command."""
    from iared2.reproduce.bench import Bench
    from iared2.reproduce.command import run_reproduction

    folders = given.pop("data")
    if len(folders) != 1:
        raise ConfigError(f"--data: got {len(folders)} folders, but {table} trains on one")
    return run_reproduction(table, Bench(folders[0], output, device=common.device, workers=common.workers, **given))


def _reproduce_maps(table: str, output: Path, given: dict[str, Any], common: Common) -> int:
    """Tables and figures of models that are trained already."""
    from iared2.reproduce.command import run_maps
    from iared2.reproduce.maps import MapsBench

    models = tuple(given.pop("models", [given.pop("model", DEFAULT)]))
    several: dict[str, Any] = {name: tuple(given.pop(name, ())) for name in ("data", "photos")}
    return run_maps(table, MapsBench(output, models, device=common.device, workers=common.workers, **several, **given))


# ---- errors, in one place -------------------------------------------------------------------------------------


def _configure() -> None:
    """Logging and warnings belong to the command, never to the library."""
    from PIL import Image
    from rich.logging import RichHandler

    logger = logging.getLogger("iared2")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_time=False))
        logger.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # pictures.py has its own, named limit
    warnings.filterwarnings("ignore", module=r"PIL\..*")  # damaged metadata: the pixels decide


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    _configure()
    try:
        return int(app(tokens, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except KeyboardInterrupt:
        complain("interrupted; what was finished stays")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CycloptsError, IARED2Error) as error:
        if "--debug" in tokens:
            raise
        complain(str(error))
        return NOTHING_DONE
    except Exception as error:
        if "--debug" in tokens:
            raise
        complain(f"unexpected {type(error).__name__}: {error}; run with --debug for the traceback, and please report it")
        return DEFECT


if __name__ == "__main__":
    sys.exit(main())
