"""Optimisers and learning-rate schedules as data; the optimisers themselves are torch's and timm's."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from iared2.errors import ConfigError
from iared2.settings import Settings, unknown_key

Whole = Annotated[int, Field(strict=True)]  # else `true` would count as 1
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """How one stage is optimised. Defaults are the paper's: Adam, 4e-5, cosine."""

    optimizer: str = Field("adam", description="a name known to timm.optim: adam, adamw, sgd, muon, ...")
    lr: float = Field(4e-5, gt=0, description="peak learning rate at `lr_batch` images per step")
    lr_batch: Whole = Field(512, gt=0, description="global batch size that `lr` refers to; scaled linearly from there")
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    decay: float = Field(0.3, ge=0, le=1, description="trapezoid only: share of the steps in which it falls to 0")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; None leaves gradients alone")


def schedule_factor(settings: OptimSettings, step: int, total: int) -> float:
    """The share of the peak rate used at `step` (from 0) of `total`: a pure function, so resuming needs no state."""
    warmup = round(settings.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1 - progress
    fall = max(1, round(settings.decay * total))
    return min(1.0, (total - step) / fall)


def build_optimizer(module: nn.Module, settings: OptimSettings, global_batch: int) -> torch.optim.Optimizer:
    """A timm optimiser over the parameters of `module` that require gradients; each group remembers its peak rate."""
    known = [str(name) for name in list_optimizers()]
    if settings.optimizer not in known:
        raise ConfigError(unknown_key(settings.optimizer, known).replace("setting", "optimizer"))
    lr = settings.lr * global_batch / settings.lr_batch
    kwargs: dict[str, Any] = {} if settings.optimizer == "sgd" else {"betas": settings.betas}
    try:
        optimizer = create_optimizer_v2(module, opt=settings.optimizer, lr=lr, weight_decay=settings.weight_decay, **kwargs)
    except (TypeError, ValueError, LookupError, AssertionError) as error:  # one with three betas, or for CUDA alone
        raise ConfigError(f"optimizer: got {settings.optimizer!r}, which cannot be used here ({error}); try adam, adamw or sgd") from None
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_rate(groups: Iterable[dict], factor: float) -> None:
    """Sets every group's learning rate to `factor` of its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
