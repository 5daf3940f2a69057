"""What the library asks of a backbone, and the registry that finds an adapter for one.

An adapter is made of the backbone's own submodules, called on packed tensors; parameters and state-dict keys
stay the backbone's. To support another family: subclass `BackboneAdapter`, implement the abstract methods, and
register it with `register_adapter` or through the entry-point group "iared2.backbones".
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iared2.errors import UnsupportedBackboneError
from iared2.interpreter import QueryKey
from iared2.seeds import uniform_per_image
from iared2.tokens.packed import Layout, PackedTokens

logger = logging.getLogger("iared2")


@dataclass(frozen=True)
class Attended:
    """What a block's attention half hands on: the tokens after it and, if asked for, what it knew about them.

    Attributes:
        key_THK: the keys it used.
        class_TH: the class token's logits for every row, log of mass left out (`class_logits`).
    """

    tokens: PackedTokens
    key_THK: Float[Tensor, "T H K"] | None = None
    class_TH: Float[Tensor, "T H"] | None = None


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of one block for an image of n tokens: n * per_token + n^2 * per_pair.

    `feed_per_token` is the part of `per_token` that falls in the second half, where the block has one; `seen_per_token` the part that
    makes keys and values, where the adapter can run the block for prefix tokens alone.
    """

    per_token: int
    per_pair: int
    feed_per_token: int = 0
    seen_per_token: int = 0

    def macs(self, tokens: int, fed: int | None = None) -> int:
        """For an image of `tokens` tokens, of which `fed` (all by default) reach the second half."""
        saved = 0 if fed is None else (tokens - fed) * self.feed_per_token
        return self.linear(tokens) + tokens * tokens * self.per_pair - saved

    def linear(self, tokens: int, fed: int | None = None) -> int:
        """The same without the two products of attention."""
        return tokens * self.per_token - (0 if fed is None else (tokens - fed) * self.feed_per_token)

    def prefix_alone(self, tokens: int, prefix: int, products: bool = True) -> int:
        """For an image of `tokens` tokens, of which the block computes the first `prefix`; the others are keys and values only."""
        pairs = prefix * tokens * self.per_pair if products else 0
        return tokens * self.seen_per_token + prefix * (self.per_token - self.seen_per_token) + pairs


class BackboneAdapter(ABC):
    """A backbone as embed -> blocks (attend, feed) -> norm -> head, on packed tokens.

    Attributes:
        module: the untouched backbone.
        prefix: tokens in front of the patches (class, distillation, register tokens).
        has_class_token: whether the first prefix token is a class token.
        width, heads, depth: D, H, and the number of blocks.
        splits: for each block, whether a reduction may act between its two halves.
        gives_class_logits: whether `attend` can be asked for the class token's logits (`want_class=True`).
    """

    module: Any
    prefix: int
    has_class_token: bool
    width: int
    heads: int
    depth: int
    splits: tuple[bool, ...]
    gives_class_logits: bool = False

    @classmethod
    @abstractmethod
    def missing(cls, module: nn.Module) -> str | None:
        """Why this adapter cannot serve `module`, in one clause; None if it can."""

    @abstractmethod
    def __init__(self, module: nn.Module) -> None: ...

    @property
    def needs_patch(self) -> bool:
        """Whether the head needs at least one patch token per image; by default, where there are no prefix tokens."""
        return self.prefix == 0

    @property
    def answering(self) -> int:
        """How many prefix tokens, from the first on, the head reads where it pools no patches."""
        return 1

    @property
    def reads_prefix_alone(self) -> bool:
        """Whether the head reads prefix tokens alone, and `attend_prefix` can run the last block for those."""
        return False

    @abstractmethod
    def embed(self, images: Float[Tensor, "B C height width"]) -> PackedTokens:
        """Pixels -> packed tokens with positions, as they enter block 0."""

    @abstractmethod
    def attend(self, block: int, tokens: PackedTokens, want_keys: bool = False) -> Attended:
        """First half of a block: norm, attention, scale, drop path, residual."""

    @abstractmethod
    def feed(self, block: int, tokens: PackedTokens) -> PackedTokens:
        """Second half of a block: norm, feed-forward network, scale, drop path, residual."""

    def attend_prefix(self, block: int, tokens: PackedTokens) -> PackedTokens:
        """As `attend`, for the prefix tokens alone: patches are seen, and gone afterwards. Where `reads_prefix_alone`."""
        raise NotImplementedError

    def read(self, block: int, tokens: PackedTokens, half: bool) -> Float[Tensor, "T D"]:
        """Tokens as the first half of a block reads them, or the second (`half`); by default as they are.

        A norm in front of it belongs to it: it knows which channels matter.
        """
        del block, half
        return tokens.x_TD

    @abstractmethod
    def norm(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The norm after the last block."""

    @abstractmethod
    def head(self, tokens: PackedTokens) -> Tensor:
        """Tokens after the last block -> logits."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per axis for an input of this size in pixels."""

    @abstractmethod
    def embed_macs(self, height: int, width: int) -> int:
        """Multiply-adds of the patch embedding for one image."""

    @abstractmethod
    def block_cost(self, block: int) -> BlockCost:
        """The cost of one block."""

    @abstractmethod
    def head_macs(self, tokens: int, places: int) -> int:
        """Multiply-adds of everything after the last block for an image of `tokens` tokens on a grid of `places`."""

    def class_attention(self, block: int) -> QueryKey | None:
        """Query and key side of a block's attention, norm folded in; None where they cannot be had so plainly."""
        del block
        return None

    @abstractmethod
    def frozen_parameters(self) -> set[str]:
        """Names of patch embedding, positions and prefix tokens: fixed throughout training (section 3.2)."""


_ADAPTERS: dict[str, type[BackboneAdapter]] = {}


def register_adapter(name: str, adapter: type[BackboneAdapter]) -> None:
    """Adds an adapter under a lower-case name; the last one registered is tried first."""
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"adapter name: got {name!r}, wanted lower-case letters, digits and underscores")
    if _ADAPTERS.get(name, adapter) is not adapter:
        raise ValueError(f"adapter name: {name!r} is taken by {_ADAPTERS[name].__name__}; choose another")
    _ADAPTERS[name] = adapter


def adapters() -> dict[str, type[BackboneAdapter]]:
    """All known adapters, those of installed packages included."""
    for entry in entry_points(group="iared2.backbones"):
        if entry.name not in _ADAPTERS:
            try:
                register_adapter(entry.name, entry.load())
            except (ImportError, AttributeError, ValueError) as error:
                logger.warning("backbone adapter %r of another package is left out: %s", entry.name, error)
    return _ADAPTERS


def adapt(module: nn.Module) -> BackboneAdapter:
    """The adapter for a backbone.

    Raises:
        UnsupportedBackboneError: no adapter fits; the message lists those tried and what each missed.
    """
    tried = []
    for name, adapter in reversed(adapters().items()):
        reason = adapter.missing(module)
        if reason is None:
            return adapter(module)
        tried.append(f"{name}: {reason}")
    raise UnsupportedBackboneError(
        f"no adapter for a backbone of class {type(module).__name__}. Tried "
        + "; ".join(tried)
        + ". docs/architecture.md, 'Writing an adapter', shows how to add one"
    )


def drop_path_per_image(x_TD: Float[Tensor, "T D"], rate: float, layout: Layout, scale: bool) -> Float[Tensor, "T D"]:
    """Stochastic depth with one draw per image, as in the untouched model, not one per token or per pack."""
    uniform_B1 = uniform_per_image(layout.images, 1, x_TD.device)
    if uniform_B1 is None:
        survives_B = torch.empty(layout.images, dtype=x_TD.dtype, device=x_TD.device).bernoulli_(1 - rate)
    else:
        survives_B = (uniform_B1[:, 0] < 1 - rate).to(x_TD.dtype)
    if scale and rate < 1:
        survives_B = survives_B / (1 - rate)
    return x_TD * survives_B[layout.image_T, None]
