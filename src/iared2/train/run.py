"""From a recipe to a finished model: builds data, backbone and stages, runs them, writes the result."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import nn

from iared2.curriculum import StagePlan, algorithm_1
from iared2.data.arrays import ArrayBatches
from iared2.errors import ConfigError, IARED2Error
from iared2.model import ReducedTransformer, reduce
from iared2.model_file import read_config
from iared2.output import open_folder
from iared2.runtime import pick_device
from iared2.saving import embedded_weights, find_model, load_reduced, load_tensors, pretrained_backbone, save_reduced, sha256
from iared2.seeds import seed_all
from iared2.train.budget import reduced_for, trade_off, train_together
from iared2.train.checkpoint import refuse_another_recipe
from iared2.train.dense import DenseTask, held_out_accuracy
from iared2.train.evaluation import held_out
from iared2.train.feeds import Feeds, open_feeds
from iared2.train.gumbel import GumbelTask
from iared2.train.learner import refuse_what_cannot_be_resumed
from iared2.train.recipes import DenseSettings, Recipe, ReductionSettings, find_recipe
from iared2.train.tasks import BlocksTask, InterpreterTask
from iared2.train.teacher import with_teacher
from iared2.train.together_settings import OF_THE_START, TogetherSettings
from iared2.train.trainer import RunSettings, Stage, Task, Trainer
from iared2.train.warm_start import WarmStartTask

logger = logging.getLogger("iared2.train")

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # a dtype on the command line, and what recipes call it


@dataclass(frozen=True)
class RunOptions:
    """Where a recipe runs: what the command line adds to it."""

    output: Path
    device: str = "auto"
    workers: int = 0


def run_recipe(
    recipe: str,
    overrides: list[str],
    *,
    output: Path | None,
    data: Path | None,
    weights: Path | None,
    device: str,
    dtype: str | None,
    workers: int,
    seed: int | None,
) -> int:
    """`iared2 train`: runs a recipe with the command line's choices (None: the recipe's own). Returns the exit code."""
    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(f"dtype: got {dtype!r}, wanted one of {', '.join(PRECISIONS)}")
    # As JSON, so that a folder called 2024 stays a name.
    shortcuts = [f"data.train={json.dumps(str(data))}"] if data is not None else []
    shortcuts += [f"backbone.weights={json.dumps(str(weights))}"] if weights is not None else []
    shortcuts += [f"seed={seed}"] if seed is not None else []
    shortcuts += [f"precision={PRECISIONS[dtype]}"] if dtype is not None else []
    chosen = find_recipe(recipe, [*shortcuts, *overrides])
    train(chosen, RunOptions(output or Path("runs") / chosen.name, device, workers))
    return 0


def train(recipe: Recipe, options: RunOptions, feeds: Feeds | None = None) -> Path:
    """Runs a recipe, resuming where an earlier run of the same recipe in the same folder stopped.

    Args:
        feeds: batches that are open already, in place of the recipe's data.

    Returns:
        The folder of the finished model: `model/` for a reduction, else the run folder with `backbone.safetensors`.

    Raises:
        ConfigError: a device, precision, output folder or backbone that cannot be used.
        TrainingError: the folder holds a run of another recipe, or the training diverged.
    """
    if recipe.dense is None and recipe.reduction is None and recipe.together is None:
        raise ConfigError(f"recipe {recipe.name}: has neither a dense training nor a reduction; set one of them")
    accelerator = open_accelerator(options.device, recipe.precision)
    open_folder(options.output)
    started = find_start(recipe, options.output)
    run = partial(run_settings, recipe, start=started)
    for part, settings in (("dense", recipe.dense), ("reduction", recipe.reduction), ("together", recipe.together)):
        if settings is not None:
            refuse_another_recipe(options.output / part, run(options.output / part).fingerprint)
    seed_all(recipe.seed)
    backbone = build_backbone(recipe) if started is None else started.backbone
    if (recipe.reduction or recipe.together) is not None and recipe.data.labels and getattr(backbone, "num_classes", None) == 0:
        keys = ("together.walk.labels=false", "together.block_target=dense")
        if recipe.reduction is not None:
            keys = ("reduction.reward.target=dense", "reduction.block_target=dense")
        further = f", {keys[0]} and {keys[1]}"
        raise ConfigError(
            "data.labels: got true, but this backbone has no classifier (num_classes = 0) to be right or wrong; "
            f"set data.labels=false{further}"
        )
    feeds = feeds or open_feeds(recipe, backbone, options.workers)
    if accelerator.is_main_process:  # not before all is known to fit: it may replace the record of an earlier run
        of_start = None if started is None else {"together": set(OF_THE_START)}
        (options.output / "recipe.json").write_text(recipe.model_dump_json(indent=2, exclude=of_start) + "\n")
    if recipe.dense is not None:
        with separate_attention(backbone) if accelerator.device.type == "cpu" else nullcontext():
            _train_dense(recipe.dense, backbone, feeds, run(options.output / "dense"), accelerator)
        if accelerator.is_main_process:
            _save_backbone(backbone, options.output / "backbone.safetensors")
    if recipe.together is not None:
        reduced = reduced_for(recipe.together, backbone) if started is None else started
        return _train_together(recipe.together, reduced, feeds, options.output, run(options.output / "together"), accelerator)
    if recipe.reduction is None:
        accelerator.wait_for_everyone()
        return options.output
    model = _train_reduction(recipe.reduction, backbone, feeds, run(options.output / "reduction"), accelerator)
    if accelerator.is_main_process:
        save_reduced(model, options.output / "model", with_backbone=recipe.dense is not None or None)
        logger.info("the reduced model is in %s", options.output / "model")
    accelerator.wait_for_everyone()  # whoever goes on may read what was written
    return options.output / "model"


def open_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate on the device of that name ("auto": CUDA where there is any).

    Raises:
        ConfigError: a device or precision that cannot be had here.
    """
    place = pick_device(device)
    if precision == "fp16" and place.type == "cpu":  # Accelerate would train in fp32 without a word
        raise ConfigError("precision: got fp16 on the CPU, which trains in float32 or bfloat16 only; give --dtype bfloat16 or float32")
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # Accelerate takes the current one, and each of several processes its own
    try:
        # A stage may leave parameters that it could train without a gradient: then they stay, as with one process.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        accelerator = Accelerator(cpu=place.type == "cpu", mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"precision: got {precision!r} on {place.type}, which cannot be had ({reason}); try --dtype float32") from None
    refuse_what_cannot_be_resumed(accelerator)
    if accelerator.device.type != place.type:
        raise ConfigError(f"device: got {device!r}, but Accelerate is set to {accelerator.device.type}; look at its ACCELERATE_* variables")
    return accelerator


def run_settings(recipe: Recipe, folder: Path, start: ReducedTransformer | None = None) -> RunSettings:
    """What the trainer needs to know of a recipe that runs in `folder`.

    Args:
        start: the reduced model that the run goes on from; the same name may hold another one day.
    """
    text = recipe.model_dump_json(exclude={"log_every", "checkpoint_every"})
    if start is not None:
        text += start.config.model_dump_json() + "".join(map(sha256, start.files))
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return RunSettings(folder, fingerprint, recipe.seed, recipe.checkpoint_every, recipe.log_every)


def find_start(recipe: Recipe, output: Path) -> ReducedTransformer | None:
    """The reduced model that the recipe goes on from, backbone included; None: it starts with new interpreters.

    Of its settings `skip_unread` alone is the recipe's, as it changes no answer; and another keep rule gives way to thresholds, by which
    budgets are met.

    Raises:
        ConfigError: its backbone is not the recipe's, it has weights of its own beside others that are named, or it would be overwritten.
        HubError, WeightsError: it cannot be had, or its files are damaged.
    """
    if recipe.together is None or recipe.together.start is None:
        return None
    start, (name, _, tag) = recipe.together.start, recipe.backbone.model.partition(".")
    folder = find_model(start)
    if folder.resolve() == output.resolve():
        raise ConfigError(f"together.start: {start} is the output folder, so the same command would not do the same twice; give another -o")
    spec = read_config(folder).backbone
    if name != spec.architecture or (tag and spec.tag and tag != spec.tag):
        its = ".".join(filter(None, (spec.architecture, spec.tag)))
        raise ConfigError(f"together.start: {start} reduces {its}, but the model named is {recipe.backbone.model}; give --model {its}")
    if spec.included and recipe.backbone.weights is not None:
        raise ConfigError(f"together.start: {start} brings the weights that its backbone was trained to; leave out --weights")
    model = load_reduced(folder, weights=recipe.backbone.weights)
    others = {} if model.config.rule == "threshold" else {"rule": "threshold", "thresholds": ()}
    model.configure(skip_unread=recipe.together.skip_unread, **others)
    return model


def build_backbone(recipe: Recipe) -> nn.Module:
    """The recipe's backbone: from scratch if it is to be trained, else with its weights.

    Raises:
        ConfigError: timm has no such model, or it does not take these arguments.
    """
    settings = recipe.backbone
    arguments = dict(settings.arguments)
    if recipe.dense is not None and recipe.dense.patch_drop:
        arguments["patch_drop_rate"] = max(*recipe.dense.patch_drop, 1e-6)
    name = settings.model.split(".")[0]
    weights = settings.weights if settings.weights is not None or recipe.dense is not None else embedded_weights(name)
    fetched = weights is None and recipe.dense is None
    if not fetched and not timm.is_model(name):
        raise ConfigError(f"backbone.model: timm has no model {name!r}; `iared2 models` lists what can be loaded")
    try:
        backbone = pretrained_backbone(settings.model, **arguments) if fetched else timm.create_model(name, **arguments)
    except IARED2Error:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ConfigError(f"backbone.arguments: got {json.dumps(arguments)}, which {name} does not take ({reason})") from None
    if weights is not None:
        load_tensors(backbone, Path(weights), settings.resample_positions)
    return backbone


def _train_dense(dense: DenseSettings, backbone: nn.Module, feeds: Feeds, run: RunSettings, accelerator: Accelerator) -> None:
    batches = feeds.train
    if dense.teacher is not None:
        if not isinstance(batches, ArrayBatches):
            raise ConfigError("dense.teacher: soft labels need pictures in memory; set data.in_memory=true")
        with accelerator.main_process_first():  # it writes the file that the others read
            arrays = with_teacher(batches.images, dense.teacher, run.folder / "teacher.safetensors", accelerator.device)
        batches = replace(batches, images=arrays)
    weight, temperature = (dense.teacher.weight, dense.teacher.temperature) if dense.teacher else (0.0, 1.0)
    task = DenseTask(backbone, dense.smoothing, weight, temperature, dense.patch_drop)
    evaluate = None if feeds.held_out is None else partial(held_out_accuracy, backbone, feeds.held_out, accelerator.device)
    Trainer(backbone.to(accelerator.device), run, accelerator).fit([Stage("dense", task, batches, dense.epochs, dense.optim, evaluate)])
    if hasattr(backbone.patch_drop, "prob"):
        backbone.patch_drop.prob = 0.0  # a regulariser of this training, not of the model


def _train_reduction(
    settings: ReductionSettings, backbone: nn.Module, feeds: Feeds, run: RunSettings, accelerator: Accelerator
) -> ReducedTransformer:
    model = reduce(backbone, settings.groups, interpreter=settings.interpreter, on_drop=settings.on_drop).to(accelerator.device)
    plans = algorithm_1(len(model.reducers), settings.interpreter_epochs, settings.block_epochs, settings.warm_start_epochs)
    # The dense model as it is now: on resuming, this is built again before a checkpoint is loaded.
    teacher = copy.deepcopy(backbone).eval().requires_grad_(False) if settings.block_target == "dense" and settings.block_epochs else None
    stages = [build_stage(plan, model, settings, feeds, accelerator, teacher) for plan in plans]
    Trainer(model, run, accelerator).fit(stages)
    return model.requires_grad_(True).eval()


def _train_together(
    settings: TogetherSettings, model: ReducedTransformer, feeds: Feeds, output: Path, run: RunSettings, accelerator: Accelerator
) -> Path:
    """The reduced model goes into `output` itself, so that `iared2 eval --model OUT` takes it."""
    outcome = train_together(settings, model, feeds, run, accelerator)
    if accelerator.is_main_process:
        save_reduced(outcome.model, output)
        for line in trade_off(outcome):
            logger.info("%s", line)
        logger.info("the reduced model is in %s", output)
    accelerator.wait_for_everyone()
    return output


def build_stage(
    plan: StagePlan,
    model: ReducedTransformer,
    settings: ReductionSettings,
    feeds: Feeds,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
) -> Stage:
    """One stage of the curriculum with its task, optimiser and held-out figures; `teacher` is what blocks are distilled from."""
    task: Task
    if plan.kind == "warm_start":
        ratio, sharpness, blur = settings.warm_start_ratios[plan.group], settings.warm_start_sharpness, settings.warm_start_blur
        task = WarmStartTask(model, plan.group, ratio, sharpness, blur, settings.cache_prefix)
        optim = settings.warm_start_optim
    elif plan.kind == "interpreter" and settings.interpreter_method == "gumbel":
        task = GumbelTask(model, plan.group, settings.gumbel, settings.reward.target, settings.cache_prefix)
        optim = settings.interpreter_optim
    elif plan.kind == "interpreter":
        reward = settings.reward_of(plan.group)
        task = InterpreterTask(model, plan.group, reward, settings.entropy_bonus, settings.cache_prefix, settings.estimator)
        optim = settings.interpreter_optim
    else:
        task = BlocksTask(model, plan.group, settings.train_head, teacher)
        optim = settings.block_optim
    evaluate = None
    if feeds.held_out is not None:
        evaluate = partial(held_out, model, feeds.held_out, plan.group + 1, accelerator.device)
    return Stage(plan.name, task, feeds.train, plan.epochs, optim, evaluate)


def _save_backbone(backbone: nn.Module, path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}, path)
    logger.info("the trained backbone is in %s", path)


@contextmanager
def separate_attention(backbone: nn.Module) -> Iterator[None]:
    """Has timm's attention run as separate operations inside a `with` block.

    On CPU the fused kernel's backward takes longer than everything else in a small ViT together.
    """
    fused: list[Any] = [module for module in backbone.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True
