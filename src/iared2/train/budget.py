"""From a budget to a reduced model: schedule, stages, calibration, and the trade-off that came out."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from iared2.backbones import adapt
from iared2.budget import Budget, parse_budget, powered
from iared2.errors import DataError
from iared2.evaluate.calibrate import Calibrator, Expectation
from iared2.model import ReducedTransformer, reduce
from iared2.runtime import mean_over_ranks
from iared2.train.feeds import Feeds
from iared2.train.together import FineTuneTask, ImitationTask, Memory, WalkTask
from iared2.train.together_settings import TogetherSettings
from iared2.train.trainer import Batches, RunSettings, Stage, Task, Trainer
from iared2.worth import thins

logger = logging.getLogger("iared2.train")

CALIBRATE_ON = 512  # pictures at most
# Where patches are dropped by default if they are handed over, in parts of the depth: blocks 3, 4, 5, 7 and 9 of 12. More places mean
# more deciding, and gave answers no nearer to the dense model's.
PLACES = (3 / 12, 4 / 12, 5 / 12, 7 / 12, 9 / 12)
# The same where what is dropped is gone, and redundant in pairs alone: crowds are thinned before much is known of evidence.
PLACES_IN_PAIRS = (1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12)
AROUND = (1.15, 1.07, 1.0, 0.93, 0.85)  # budgets that the trade-off is shown at, in parts of the one asked for


@dataclass(frozen=True)
class Outcome:
    """A reduced model at its budget, and what it would do at budgets around it (the asked-for one among them)."""

    model: ReducedTransformer
    expected: Expectation
    around: tuple[Expectation, ...]


def reduced_for(settings: TogetherSettings, backbone: nn.Module) -> ReducedTransformer:
    """The untrained reduced model; what the backbone cannot do is left out, and said."""
    adapter = adapt(backbone)
    gone = settings.on_drop == "discard"
    worth = settings.worth and settings.worth.for_training(gone=gone)
    blocks = settings.blocks
    if blocks is None:
        places = PLACES_IN_PAIRS if thins(worth, gone=gone) else PLACES
        blocks = tuple(sorted({min(adapter.depth - 1, max(1, int(adapter.depth * place + 1e-9))) for place in places}))
    interpreter, place = settings.interpreter, settings.place
    if place == "between" and not all(adapter.splits[block] for block in blocks if block < adapter.depth):
        logger.info("this backbone's blocks have no two halves: patches are dropped before blocks")
        place = "before"
    if interpreter.context and not adapter.gives_class_logits:
        logger.info("this backbone gives no plain class attention: interpreters see the patches alone")
        interpreter = interpreter.model_copy(update={"context": False})
    if interpreter.policy == "class" and not adapter.has_class_token:
        interpreter = interpreter.model_copy(update={"policy": "learned"})
    parts: dict[str, Any] = {"place": place, "worth": worth, "keep_length": settings.keep_length}
    parts |= {"similarity": settings.similarity, "weights": settings.weights, "skip_unread": settings.skip_unread}
    return reduce(backbone, blocks, interpreter=interpreter, on_drop=settings.on_drop, **parts)


def train_together(
    settings: TogetherSettings, model: ReducedTransformer, feeds: Feeds, run: RunSettings, accelerator: Accelerator
) -> Outcome:
    """Trains, calibrates, and measures around the budget.

    Args:
        model: `reduced_for` these settings, or what `settings.start` names.

    Raises:
        ConfigError: a budget out of reach, or a backbone whose answers are not finite.
        DataError: no pictures to calibrate on.
        TrainingError: as the trainer's.
    """
    model, backbone = model.to(accelerator.device), model.backbone
    budget = parse_budget(settings.target)
    held = _images(feeds.held_out or feeds.train, accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        # Before anything is trained: it refuses answers that are not finite.
        calibrator = Calibrator(model, held, second_look=settings.second_look)
        share = _share_for_training(budget, calibrator)
        # Interpreters that exist have thresholds, and what they leave may be far from the plain curve.
        family = calibrator.plain_curve() if settings.start is None else calibrator.family()
        ratios = powered(family, calibrator.power_for(family, share))
    logger.info("aiming at %.3f of the dense multiply-adds; patches left meanwhile %s", share, ", ".join(f"{r:.2f}" for r in ratios))
    stages = _stages(settings, model, feeds, share - calibrator.second_share, ratios)  # walks are first passes
    before = [value.detach().clone() for value in backbone.parameters()] if settings.block_epochs and settings.block_share < 1 else []
    Trainer(model, run, accelerator).fit(stages)
    if before:
        go_back(backbone, before, settings.block_share)
    if hasattr(model.reducers, "price"):  # of this training, not of the model
        del model.reducers.price
    model.requires_grad_(True).eval()
    with torch.no_grad(), accelerator.autocast():
        calibrator = Calibrator(model, held, dense=calibrator.dense, second_look=settings.second_look)
        calibrator.warn_of_few()
        calibrator.thresholds_for(ratios)
        around = tuple(calibrator.around(share, AROUND))
        # The nearest: a training is not thrown away because a time came out otherwise.
        expected = calibrator.settled(lambda: calibrator.meet(budget, nearest=True))
    return Outcome(model, expected, around)


@torch.no_grad()
def go_back(backbone: nn.Module, before: Sequence[Tensor], share: float) -> None:
    """Goes from the trained weights back towards those `before`, so that `share` of the way is left.

    On few pictures what blocks learn is part for all pictures, part for those; in between the two is less of the second (Wortsman et al.,
    Robust fine-tuning of zero-shot models, 2022).
    """
    for value, old in zip(backbone.parameters(), before, strict=True):
        value.copy_(old.lerp(value, share))


def _share_for_training(budget: Budget, calibrator: Calibrator) -> float:
    """The budget as a share of multiply-adds; a time is turned into one by measuring untrained reductions."""
    if budget.kind != "ms":
        return budget.share(calibrator.dense_macs)
    measured = calibrator.to_milliseconds(budget.value).share
    return float(mean_over_ranks(torch.tensor(measured, device=next(calibrator.model.parameters()).device)))  # each took its own time


def _stages(settings: TogetherSettings, model: ReducedTransformer, feeds: Feeds, share: float, ratios: tuple[float, ...]) -> list[Stage]:
    memory = Memory() if settings.remember else None
    plans: list[tuple[str, int, Any]] = [
        ("imitation", settings.imitation_epochs, settings.imitation_optim),
        ("walks", settings.walk_epochs, settings.walk_optim),
        ("blocks", settings.block_epochs, settings.block_optim),
    ]
    stages = []
    for name, epochs, optim in plans:
        if not epochs:
            continue
        task: Task
        if name == "imitation":
            task = ImitationTask(model, ratios, memory, settings.against, settings.blur)
        elif name == "walks":
            task = WalkTask(model, settings.walk, memory, share)
        else:
            # A memory of its own: the evidence's pass gives other last digits, and a resumed run must not see the difference.
            own = Memory() if settings.remember else None
            teacher = copy.deepcopy(model.backbone).eval().requires_grad_(False) if settings.block_target == "dense" else None
            task = FineTuneTask(model, teacher, own, settings.block_first, settings.train_head)
        stages.append(Stage(name, task, feeds.train, epochs, optim))
    return stages


def trade_off(outcome: Outcome) -> Iterator[str]:
    """Lines for people: what was reached, and what budgets around it would give."""
    if outcome.expected.cosine:
        yield "   MACs   cosine to dense   patches left"
        for one in outcome.around:
            yield f"{one.share:6.3f}x   {one.agreement / 100:15.4f}   {one.ratios[-1]:12.2f}"
    else:
        yield "   MACs   agree with dense   KL to dense   patches left"
        for one in outcome.around:
            yield f"{one.share:6.3f}x   {one.agreement:14.1f} %   {one.kl:11.4f}   {one.ratios[-1]:12.2f}"
    yield f"reached: {outcome.expected.line()}"


def _images(batches: Batches, device: torch.device) -> list[Float[Tensor, "B 3 height width"]]:
    """Batches of pictures, `CALIBRATE_ON` of them at most."""
    found: list[Tensor] = []
    for images in _pictures(batches):
        found.append(images.to(device))
        if sum(map(len, found)) >= CALIBRATE_ON:
            break
    if not found:
        raise DataError("budget: there are no pictures to calibrate on; hold some out (data.held_out)")
    return found


def _pictures(batches: Batches) -> Iterator[Tensor]:
    for batch in batches.epoch(0):
        yield batch["images"]
