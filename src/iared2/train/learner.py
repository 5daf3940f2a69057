"""What Accelerate trains of a stage: the task and its optimiser or, with FSDP, a copy of it of which each process holds a part.

The caller's task stays whole on every process: it is what is evaluated, saved and handed to the next stage, and `collect` writes
what was learnt into it. Only what is trained is divided, with its gradients and optimiser state; frozen weights have neither, and
the copy shares them, so that a model is never gathered for the passes that store no gradient.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from iared2.errors import ConfigError
from iared2.train.checkpoint import load_optimizer_state

logger = logging.getLogger("iared2.train")

_REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def refuse_what_cannot_be_resumed(accelerator: Accelerator) -> None:
    """Does nothing for one process, for several that each hold the whole model, and for FSDP of torch's second kind.

    Raises:
        ConfigError: weights divided in a way that a checkpoint here would not hold whole.
    """
    kind = accelerator.distributed_type
    if kind in _REFUSED:
        got, wanted = kind.value, "one process, several that each hold the whole model, or FSDP"
        raise ConfigError(f"accelerate: got {got}, which cannot be resumed here, wanted {wanted}; unset ACCELERATE_USE_{got}")
    if kind is DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("accelerate: got FSDP version 1, wanted 2; set FSDP_VERSION=2, or fsdp_version: 2 in Accelerate's configuration")


Trained = TypeVar("Trained", bound=nn.Module)


class Learner(Generic[Trained]):
    """A task and its optimiser, ready to be trained.

    Args:
        task: with its weights loaded and `begin` called; stays whole.
        build: makes the optimiser of a task.
        shared: what the task holds beside its modules and a copy should not have anew.
    """

    def __init__(
        self,
        task: Trained,
        build: Callable[[nn.Module], torch.optim.Optimizer],
        accelerator: Accelerator,
        shared: Sequence[object] = (),
    ) -> None:
        self._callers, self._accelerator = task.to(accelerator.device), accelerator
        self.divided = accelerator.distributed_type is DistributedType.FSDP
        self.task = task
        if self.divided:
            self.task = copy_of_trained(task, shared)
            _one_unit(accelerator, _frozen(task))
        # Accelerate runs what it prepares in the wanted precision, but for FSDP.
        self._precision = accelerator.autocast if self.divided else nullcontext
        self._prepared, self.optimizer = accelerator.prepare(self.task, build(self.task))

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the task returns of a batch."""
        with self._precision():
            return self._prepared(batch)

    def clip(self, limit: float) -> Tensor:
        """Scales gradients down to a norm of `limit`; returns the norm before, the same on every process."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if not self.divided:
            return self._accelerator.clip_grad_norm_(parameters, limit)
        self._accelerator.unscale_gradients(self.optimizer)  # Accelerate's own way compares lists of parameters, which parts refuse
        return _whole(nn.utils.clip_grad_norm_(parameters, limit))

    def collect(self) -> None:
        """Writes what was learnt into the caller's task; every process must call it."""
        if self.divided:
            learnt = {name: _whole(value) for name, value in self.task.named_parameters() if value.requires_grad}
            with torch.no_grad():
                for name, value in self._callers.named_parameters():
                    if name in learnt:
                        value.copy_(learnt[name])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state as one process would have it; every process must call it."""
        return _mapped(self.optimizer.state_dict(), _whole)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Takes over a checkpoint's optimiser state, by however many processes it was written.

        Raises:
            TrainingError: the state is missing or damaged.
        """
        load_optimizer_state(checkpoint, self.optimizer, self._accelerator.device, self._divide if self.divided else None)

    def _divide(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a whole optimiser state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def part(number: int, value: Any) -> Any:
            parameter = parameters[number]
            if not isinstance(value, Tensor) or value.shape != parameter.shape:  # a count of steps
                return value
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)

        parts = {number: {key: part(number, value) for key, value in of.items()} for number, of in state["state"].items()}
        return state | {"state": parts}


def _one_unit(accelerator: Accelerator, frozen: list[nn.Parameter]) -> None:
    """Has FSDP gather all that is trained where the task's forward begins: tasks walk through blocks in parts, unseen by their hooks."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None or plugin.activation_checkpointing:
        logger.info("FSDP: what is trained is one unit here; its wrapping policy and activation checkpointing are left out")
    plugin.auto_wrap_policy, plugin.activation_checkpointing = None, False
    plugin.ignored_modules = [nn.ParameterList(frozen)]
    plugin.mixed_precision_policy = None  # autocast, as everywhere
    plugin.cpu_ram_efficient_loading = False  # every process has read the weights


def _frozen(task: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in task.parameters() if not parameter.requires_grad]


def copy_of_trained(task: Trained, shared: Sequence[object]) -> Trained:
    """A copy with trained weights of its own; frozen weights, buffers and what else is `shared` are the task's."""
    kept: list[object] = [*_frozen(task), *task.buffers(), *shared]
    return copy.deepcopy(task, {id(one): one for one in kept})


def _whole(value: Any) -> Any:
    """A tensor of which processes hold parts, put together on each of them; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of dicts and lists with every leaf changed, in order: processes gather leaves together."""
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [_mapped(value, change) for value in state]
    return change(state)
