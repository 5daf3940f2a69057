"""One training loop for every stage, on Hugging Face accelerate. It knows no objective: a task brings its loss.

Exact resume: data order, augmentation and sampling are pure functions of (seed, stage, step), and the
learning rate is a pure function of the step, so a checkpoint is the weights, the optimiser's state and a
place; a task that remembers pictures is shown them again. Checkpoints are written to a temporary folder and
renamed, so a kill at any moment leaves a whole one.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iared2.errors import TrainingError
from iared2.runtime import mean_over_ranks
from iared2.seeds import draws_of_batch, seed_all
from iared2.train.checkpoint import Place, latest_checkpoint, load_weights, save_checkpoint
from iared2.train.learner import Learner
from iared2.train.logs import StageLog
from iared2.train.optim import OptimSettings, build_optimizer, schedule_factor, set_rate

logger = logging.getLogger("iared2.train")

_PATIENCE = 20  # steps in a row that a gradient scaler may skip while it looks for its scale


@runtime_checkable
class Batches(Protocol):
    """Where batches come from; every method is a pure function of its arguments."""

    @property
    def batch_size(self) -> int: ...

    def steps(self, world: int = 1) -> int: ...

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]: ...


class Task(nn.Module):
    """A model and a loss. `forward(batch)` returns {"loss": scalar, name: scalar to log, ...}.

    It raises FloatingPointError("the ... are not finite") where it cannot go on with what is not.
    """

    def begin(self) -> None:
        """Called once before the stage: sets what requires gradients, and train or eval mode."""

    def first_look(self, batches: Batches) -> None:
        """Called once before the first step, and not on resuming: sets what the data decide."""

    @property
    def remembers(self) -> bool:
        """Whether it keeps what it computed for a picture, so that `look_back` has something to do."""
        return False

    def look_back(self, batch: dict[str, Tensor]) -> None:
        """Called on resuming, with each batch of the stage's finished steps: remembers what it had remembered."""

    def shared(self) -> list[object]:
        """What it holds beside its modules, such as memories and teachers, and every copy of it should share."""
        return []

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch (schedules that depend on it)."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Stage:
    """One entry of a curriculum: what is trained, on what, for how long, and how.

    `evaluate` gives held-out figures, about five times a stage and at its end. `epochs` may end within one: 0.25 is a quarter of the
    first one's batches.
    """

    name: str
    task: Task
    batches: Batches
    epochs: float
    optim: OptimSettings
    evaluate: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class RunSettings:
    """What a run needs beside its stages. `fingerprint` names the recipe; a checkpoint of another is refused."""

    folder: Path
    fingerprint: str
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50


class Trainer:
    """Runs stages in order over one model, resuming from the run folder's last checkpoint if there is one."""

    def __init__(self, model: nn.Module, settings: RunSettings, accelerator: Accelerator) -> None:
        self.model = model
        self.settings = settings
        self.accelerator = accelerator
        self._skipped = 0

    def fit(self, stages: Sequence[Stage]) -> None:
        """Trains every stage that the last checkpoint has not finished.

        Raises:
            TrainingError: a score, gradient or weight that is not finite, or a checkpoint of another recipe.
        """
        checkpoint = latest_checkpoint(self.settings.folder)
        place = Place()
        if checkpoint is not None:
            place = load_weights(checkpoint, self.model, self.settings.fingerprint)
            logger.info("resuming %s at stage %d, step %d", self.settings.folder, place.stage, place.step)
        for index, stage in enumerate(stages):
            if index < place.stage:
                continue
            start = place.step if index == place.stage else 0
            steps = self._run(index, stage, start, checkpoint if start else None)
            self._save(stage, steps, Place(stage=index + 1, step=0), None)

    def _run(self, index: int, stage: Stage, start: int, checkpoint: Path | None) -> int:
        """Trains one stage from step `start` on; returns how many steps it has."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        per_epoch = stage.batches.steps(world)
        total = max(1, round(stage.epochs * per_epoch))
        epochs = math.ceil(stage.epochs)
        stage.task.begin()
        if start == 0:
            stage.task.first_look(stage.batches)
        if stage.task.remembers:
            self._look_back(stage, start, per_epoch)
        batch_size = stage.batches.batch_size * world
        learner = Learner(stage.task, lambda task: build_optimizer(task, stage.optim, batch_size), accelerator, stage.task.shared())
        if checkpoint is not None:
            learner.load_optimizer(checkpoint)
        log = StageLog(self.settings.folder, stage.name, start, total, accelerator.is_main_process)
        step = start
        with log:
            for epoch in range(start // per_epoch, epochs):
                learner.task.begin_epoch(epoch)
                batches = stage.batches.epoch(epoch, step - epoch * per_epoch, accelerator.process_index, world)
                for batch in islice(batches, total - step):
                    set_rate(learner.optimizer.param_groups, schedule_factor(stage.optim, step, total))
                    seed_all(self.settings.seed, index, step, accelerator.process_index)
                    with draws_of_batch(
                        self.settings.seed, index, step, rank=accelerator.process_index, world=world, device=accelerator.device
                    ):
                        logs = self._step(learner, stage, batch, step)
                    step += 1
                    images = len(batch["labels"]) * world
                    log.step(step, images, epoch + 1, learner.optimizer.param_groups[0]["lr"], logs, self.settings.log_every)
                    if step % self.settings.checkpoint_every == 0 and step < total:
                        self._save(stage, step, Place(stage=index, step=step), learner)
                due = (epoch + 1) % max(1, epochs // 5) == 0 or epoch + 1 == epochs
                if stage.evaluate is None or not due:
                    continue
                learner.collect()
                if accelerator.is_main_process:
                    log.evaluation(step, epoch + 1, stage.evaluate())
                    stage.task.begin()  # an evaluation may have left eval mode behind
        learner.collect()
        accelerator.free_memory()
        return total

    def _look_back(self, stage: Stage, start: int, per_epoch: int) -> None:
        """Shows a task the batches before step `start` again: the last digits of what it kept depend on which pictures came together."""
        for epoch in range(-(-start // per_epoch)):
            batches = stage.batches.epoch(epoch, 0, self.accelerator.process_index, self.accelerator.num_processes)
            for batch in islice(batches, start - epoch * per_epoch):
                with self.accelerator.autocast():
                    stage.task.look_back(self._here(batch))

    def _here(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def _step(self, learner: Learner[Task], stage: Stage, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        try:
            logs = learner(self._here(batch))
        except FloatingPointError as error:
            raise self._not_finite(stage, step, str(error)) from None
        self.accelerator.backward(logs["loss"])
        norm = learner.clip(stage.optim.clip_norm if stage.optim.clip_norm is not None else float("inf"))
        # After the all-reduce every rank sees the same norm, so all ranks stop together.
        if not torch.isfinite(norm):
            self._skipped += 1
            # In fp16 the scaler starts too high on purpose: it skips such a step and halves its scale.
            if self.accelerator.scaler is None or self._skipped >= _PATIENCE:
                raise self._not_finite(stage, step, f"the gradient is not finite (loss {logs['loss'].item():.4g})")
        else:
            self._skipped = 0
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        return self._over_ranks(logs) | {"grad_norm": norm}

    def _over_ranks(self, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the task reports of the whole batch: the mean over ranks."""
        if self.accelerator.num_processes == 1:
            return logs
        means = mean_over_ranks(torch.stack([value.detach().float() for value in logs.values()]))
        return dict(zip(logs, means.unbind(0), strict=True))

    def _not_finite(self, stage: Stage, step: int, what: str) -> TrainingError:
        return TrainingError(
            f"stage {stage.name}, step {step}: {what}; "
            f"the last good checkpoint stays in {self.settings.folder}. Lower the learning rate or train in fp32"
        )

    def _save(self, stage: Stage, step: int, place: Place, learner: Learner[Task] | None) -> None:
        state = None
        if learner is not None:
            learner.collect()
            state = learner.optimizer_state()
        # On every rank, so that all of them stop; a step's gradient may be finite and what it makes of the weights not.
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise self._not_finite(stage, step, "the weights are not finite")
        if self.accelerator.is_main_process:
            save_checkpoint(self.settings.folder, self.model, state, place, self.settings.fingerprint)
        self.accelerator.wait_for_everyone()
