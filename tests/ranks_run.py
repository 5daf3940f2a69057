"""Small stages as a script for one or several processes: `torchrun --nproc-per-node 2 ranks_run.py FOLDER [--fsdp] [--bf16] NAME...`.

Tests compare what it leaves, `FOLDER/NAME/model.safetensors`, between numbers of processes, and kill one on the way.
"""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import iared2  # noqa: F401 - first: see iared2/_compat.py

# isort: split
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tiny_run
from iared2.curriculum import StagePlan
from iared2.data.arrays import ArrayBatches, Preprocess
from iared2.model import reduce
from iared2.train.budget import reduced_for
from iared2.train.dense import DenseTask
from iared2.train.feeds import Feeds
from iared2.train.optim import OptimSettings
from iared2.train.run import build_stage, open_accelerator
from iared2.train.together import ImitationTask, WalkTask
from iared2.train.together_settings import TogetherSettings, WalkSettings
from iared2.train.trainer import RunSettings, Stage, Trainer

GLOBAL_BATCH = 8
# Not Adam: it makes a step of a gradient that is zero but for rounding.
OPTIM = {"optimizer": "sgd", "lr": 0.3, "lr_batch": GLOBAL_BATCH}
NAMES = ("dense", "warm_start", "interpreter", "blocks", "together", "walks")


@dataclass(frozen=True)
class Deadly:
    """Batches that kill the process of `rank` at a step of the second epoch, but not once it was started anew.

    `note` takes down where each pass over them began.
    """

    inner: ArrayBatches
    step: int
    rank: int
    note: Path

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    def steps(self, world: int = 1) -> int:
        return self.inner.steps(world)

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        with self.note.open("a") as stream:
            stream.write(f"rank {rank} epoch {epoch} from {start}\n")
        for step, batch in enumerate(self.inner.epoch(epoch, start, rank, world), start):
            if (epoch, step, rank) == (1, self.step, self.rank) and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def feeds(world: int) -> Feeds:
    """Augmented pictures, so that views are compared as well."""
    how = Preprocess((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_scale=0.5)
    arrays, held_out = tiny_run.tiny_arrays(), tiny_run.tiny_arrays(16, 1)
    return Feeds(ArrayBatches(arrays, how, GLOBAL_BATCH // world), ArrayBatches(held_out, how, 8, train=False))


def curriculum_stage(kind: str, accelerator: Accelerator) -> tuple[nn.Module, Stage]:
    """A stage of the second group: what comes before it leaves lengths ragged, and blocks draw stochastic depth."""
    optims = {f"{name}_optim": OPTIM for name in ("warm_start", "block")} | {"interpreter_optim": OPTIM | {"lr": 30.0}}
    recipe = tiny_run.tiny_recipe(
        warm_start_sharpness=3.0,
        entropy_bonus=0.05,
        train_head=True,
        interpreter={"policy": "class", "start": "attention", "init_score": 0.8},
        **optims,
    )
    model = reduce(tiny_run.tiny_backbone(), 2, interpreter=recipe.reduction.interpreter, on_drop="merge")
    return model, build_stage(StagePlan(kind, 1, 2), model, recipe.reduction, feeds(accelerator.num_processes), accelerator)


def dense_stage(accelerator: Accelerator) -> tuple[nn.Module, Stage]:
    """Everything is trained, some of it with weight decay; no stochastic depth, which timm draws per rank."""
    model = tiny_run.tiny_backbone(drop_path_rate=0.0)
    optim = OptimSettings(**OPTIM, weight_decay=0.01)
    return model, Stage("dense", DenseTask(model, 0.1, 0.0, 1.0, ()), feeds(accelerator.num_processes).train, 2, optim)


def walks_stage(accelerator: Accelerator) -> tuple[nn.Module, Stage]:
    """Two walks per picture, so that the two numbers of a worth are trained too."""
    model = reduced_for(TogetherSettings(), tiny_run.tiny_backbone())
    task = WalkTask(model, WalkSettings(samples=2), None, 0.7)
    return model, Stage("walks", task, feeds(accelerator.num_processes).train, 2, OptimSettings(**OPTIM))


def together_stage(accelerator: Accelerator) -> tuple[nn.Module, Stage]:
    settings = TogetherSettings(imitation_optim=OPTIM, remember=False)
    model = reduced_for(settings, tiny_run.tiny_backbone())
    task = ImitationTask(model, tuple(0.8**number for number in range(1, 1 + len(model.reducers))), None)
    return model, Stage("imitation", task, feeds(accelerator.num_processes).train, 2, settings.imitation_optim)


def fresh(name: str) -> nn.Module:
    """The model that `name` starts from."""
    return stage_of(name, Accelerator(cpu=True))[0]


def stage_of(name: str, accelerator: Accelerator) -> tuple[nn.Module, Stage]:
    """A model and what is done to it."""
    others = {"dense": dense_stage, "walks": walks_stage, "together": together_stage}
    return others[name](accelerator) if name in others else curriculum_stage(name, accelerator)


class Noting(Trainer):
    """Notes after each step which share of what is trained this process holds."""

    def _step(self, learner, *rest):
        logs = super()._step(learner, *rest)
        trained = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
        mine = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
        with (self.settings.folder / f"share-{self.accelerator.process_index}.txt").open("a") as stream:
            stream.write(f"{sum(part.numel() for part in mine) / sum(parameter.numel() for parameter in trained)}\n")
        return logs


def run(name: str, folder: Path, accelerator: Accelerator) -> None:
    """One stage of two epochs; `killed` is the interpreter's, in which the last process dies in the second epoch."""
    kind = "interpreter" if name == "killed" else name
    model, stage = stage_of(kind, accelerator)
    if name == "killed":
        stage = replace(stage, batches=Deadly(stage.batches, step=3, rank=accelerator.num_processes - 1, note=folder / "passes.txt"))
    settings = RunSettings(folder / name, "ranks", seed=3, checkpoint_every=2, log_every=1)
    Noting(model, settings, accelerator).fit([stage])
    if accelerator.is_main_process:
        save_file({key: value.detach().contiguous() for key, value in model.state_dict().items()}, folder / name / "model.safetensors")


def divided(accelerator: Accelerator) -> Accelerator:
    """Accelerate takes FSDP for accelerators alone; over gloo on CPUs the rest of it is the same code."""
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=100)
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    return accelerator


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    options = {name for name in names if name.startswith("--")}
    accelerator = open_accelerator("cpu", "bf16" if "--bf16" in options else "no")
    if "--fsdp" in options:
        accelerator = divided(accelerator)
    for name in [name for name in names if name not in options]:
        run(name, folder, accelerator)
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
