"""Who answers: the dense backbone on raw pictures, with patches really dropped at its input where that is asked."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iared2.errors import ConfigError
from iared2.keep import Given
from iared2.model import ReducedTransformer
from iared2.tokens.packed import take


class Answers(Protocol):
    """From raw images, pixels in [0, 1], to logits. Any function is one."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


class DropsPatches(Protocol):
    """From raw images and the patches that are left to logits."""

    def grid(self, images: Tensor) -> tuple[int, int]: ...

    def without(self, images: Tensor, keep_BN: Tensor) -> Tensor: ...


def finite(logits: Float[Tensor, "B K"], whose: str) -> Float[Tensor, "B K"]:
    """Answers as they are.

    Raises:
        ConfigError: one is not finite. It would count as an answer, agree with the next, and make any difference 0.
    """
    if not logits.isfinite().all():
        raise ConfigError(f"{whose} answers NaN or infinity; check its weights, or compute in float32")
    return logits


class Judge:
    """The dense backbone inside a model, reducers aside: the same judge for every method.

    Args:
        mean, std: per channel, on the scale 0..1; normalisation comes after removal.

    Raises:
        ConfigError: a model without a classifier.
    """

    def __init__(self, model: ReducedTransformer, mean: Sequence[float], std: Sequence[float]) -> None:
        if model.num_classes < 1:
            raise ConfigError("this model has no classifier, so there is no answer that removal could change; load one with classes")
        self.model = model
        parameter = next(model.parameters())
        self.mean_C11 = torch.tensor(mean, device=parameter.device)[:, None, None]
        self.std_C11 = torch.tensor(std, device=parameter.device)[:, None, None]

    def normalised(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Raw images as the backbone wants them."""
        parameter = next(self.model.parameters())
        return ((images.to(parameter.device) - self.mean_C11) / self.std_C11).to(parameter.dtype)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return finite(self.model.backbone(self.normalised(images)).float(), "the dense model")

    def grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.adapter.grid(images.shape[-2], images.shape[-1])

    @torch.no_grad()
    def without(self, images: Float[Tensor, "B C H W"], keep_BN: Bool[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Logits when only some patches enter block 0. The others' tokens are gone: no colour stands in for them.

        Where patches are embedded by a stem of overlapping convolutions, kept tokens have seen a few pixels of their dropped neighbours.
        An image of a backbone that pools patches must keep one.

        Raises:
            ConfigError: an answer that is not finite; so does a call.
        """
        adapter = self.model.adapter
        tokens = adapter.embed(self.normalised(images))
        rule = Given(keep_BN.to(tokens.x_TD.device))
        tokens = take(tokens, rule(torch.zeros_like(tokens.x_TD[:, 0]), tokens.layout))
        for block in range(adapter.depth):
            tokens = adapter.feed(block, adapter.attend(block, tokens).tokens)
        return finite(adapter.head(tokens).float(), "the dense model")
