"""Where and how precisely to run: from words on a command line to torch's objects."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from iared2.errors import ConfigError

T = TypeVar("T")

DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, otherwise the CPU.

    Raises:
        ConfigError: no such device, not on this machine, or one that cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds shapes without values and cannot compute")  # noqa: TRY301 - one message for all reasons
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["not available"])[0][:120]
        raise ConfigError(f"device: got {name!r}, which cannot be used here ({reason}); try --device cpu") from None
    return device


def precision(device: torch.device, dtype: str) -> AbstractContextManager:
    """A context in which matrix products run in `dtype` (float32 changes nothing).

    Raises:
        ConfigError: a dtype that is not supported.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if DTYPES[dtype] is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def is_main() -> bool:
    """Whether this is the main process of a distributed run, or the only one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_rank() == 0


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main process of a distributed run, on every process; nobody else calls it, and all wait for it.

    Where there is one process, what it returns. What is returned has to be small and picklable.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return make()
    found: list = [make() if is_main() else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes of a distributed run, the same on each; itself where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def mean_of_all(value: torch.Tensor) -> torch.Tensor:
    """This rank's part in the mean over the elements that all ranks hold; ranks may hold different numbers of them.

    Averaged over ranks, parts are that mean and their gradients its gradient. With one process it is the mean itself.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value.mean()
    return value.sum() / mean_over_ranks(value.new_tensor(float(value.numel()), dtype=torch.float64)).to(value.dtype)
