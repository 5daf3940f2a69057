"""The reduced transformer: a backbone walked block by block, with reducers in between. Everything learned lives in reducers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin
from jaxtyping import Float
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from iared2 import cost
from iared2.backbones import adapt
from iared2.compiling import captures_sizes
from iared2.errors import ConfigError
from iared2.handover import OnDrop
from iared2.interpreter import Interpreter, InterpreterConfig
from iared2.keep import BatchBudget, KeepRule, Threshold, TopK
from iared2.reducers.base import Reduction
from iared2.reducers.iared2 import InterpreterReducer
from iared2.settings import Settings, explain_validation
from iared2.tokens.packed import PackedTokens, to_grid
from iared2.trace import Trace


class ReductionConfig(Settings):
    """Where and how a backbone is reduced. Blocks are counted from 0."""

    first_blocks: tuple[int, ...] = Field(description="the block before which each group reduces, ascending")
    interpreter: InterpreterConfig = InterpreterConfig()
    rule: Literal["threshold", "top_k", "batch_budget"] = "threshold"
    thresholds: tuple[float, ...] = Field((), description="one per group; empty means 0.5 everywhere")
    ratios: tuple[float, ...] = Field((), description="share of the grid kept after each group (top_k, batch_budget)")
    on_drop: OnDrop = "discard"

    @model_validator(mode="after")
    def _one_value_per_group(self) -> "ReductionConfig":
        count = len(self.first_blocks)
        if not count or list(self.first_blocks) != sorted(set(self.first_blocks)) or self.first_blocks[0] < 0:
            raise ValueError(f"first_blocks: got {list(self.first_blocks)}, wanted ascending block numbers from 0")
        if self.thresholds and len(self.thresholds) != count:
            raise ValueError(f"thresholds: got {len(self.thresholds)}, wanted one for each of {count} groups")
        if self.rule != "threshold" and len(self.ratios) != count:
            raise ValueError(f"ratios: got {len(self.ratios)}, wanted one for each of {count} groups")
        return self

    def keep_rule(self, group: int, spare_best: bool) -> KeepRule:
        """The keep rule of a group."""
        if self.rule == "top_k":
            return TopK(self.ratios[group])
        if self.rule == "batch_budget":
            return BatchBudget(self.ratios[group], spare_best)
        return Threshold(self.thresholds[group] if self.thresholds else 0.5, spare_best)


def even_groups(depth: int, groups: int) -> tuple[int, ...]:
    """The first blocks of `groups` equal groups.

    Raises:
        ConfigError: the depth is not divisible by the number of groups.
    """
    if groups < 1 or depth % groups:
        divisors = [d for d in range(1, depth + 1) if depth % d == 0]
        raise ConfigError(
            f"groups: got {groups}, which does not divide the backbone's {depth} blocks evenly; "
            f"choose one of {divisors}, or give the first block of each group, e.g. groups=({depth // 3}, {2 * depth // 3})"
        )
    return tuple(range(0, depth, depth // groups))


@dataclass(frozen=True)
class State:
    """A forward pass paused before a block: tokens, the keys of the block before, reductions so far."""

    tokens: PackedTokens
    key_THK: Float[Tensor, "T H K"] | None
    block: int
    reductions: tuple[Reduction, ...] = ()


class ReducedTransformer(nn.Module, ModelHubMixin):
    """A vision transformer that drops patches group by group. Made by `iared2.reduce` or `from_pretrained`.

    Example:
        >>> import iared2, timm, torch
        >>> model = iared2.reduce(timm.create_model("deit_tiny_patch16_224"), groups=3).eval()
        >>> logits, trace = model.trace(torch.zeros(1, 3, 224, 224))
        >>> trace.heatmap(1).shape
        torch.Size([1, 14, 14])
    """

    backbone: Any  # timm's attributes are not typed
    reducers: Any  # an nn.ModuleList of InterpreterReducer

    def __init__(self, backbone: nn.Module, config: ReductionConfig) -> None:
        super().__init__()
        self.adapter = adapt(backbone)
        self.backbone = backbone
        if config.first_blocks[-1] >= self.adapter.depth:
            last = self.adapter.depth - 1
            raise ConfigError(f"first_blocks: got block {config.first_blocks[-1]}, but the backbone has blocks 0 to {last}")
        if config.interpreter.policy == "class" and not self.adapter.has_class_token:
            raise ConfigError("interpreter: policy='class' needs a class token, which this backbone lacks; use policy='learned'")
        heads = config.interpreter.heads or self.adapter.heads
        device = next(backbone.parameters()).device
        self.reducers = nn.ModuleList()
        for group in range(len(config.first_blocks)):
            interpreter = Interpreter(self.adapter.width, heads, config.interpreter).to(device)
            rule = config.keep_rule(group, self.adapter.needs_patch)
            self.reducers.append(InterpreterReducer(interpreter, rule, config.on_drop))
        self.config = config
        self.labels: list[str] | None = None  # class names, where the model knows them
        self.files: tuple[Path, ...] = ()  # the weights files it was loaded from
        self._untouched = _fingerprint(backbone)

    # ---- the walk -------------------------------------------------------------------------------------

    def start(self, images: Float[Tensor, "B C height width"]) -> State:
        """Pixels -> the state before block 0."""
        return State(self.adapter.embed(images), None, 0)

    def walk(self, state: State, stop: int, reduce: Sequence[int] | None = None) -> State:
        """Runs blocks up to (not including) `stop`, with the reducers of the given groups (all by default)."""
        groups = {b: g for g, b in enumerate(self.config.first_blocks) if reduce is None or g in reduce}
        done = len(state.reductions)
        for block in range(state.block, stop):
            group = groups.get(block)
            if group is not None and group >= done:
                state = self.reduce_with(state, group)
            state = self.run_block(state, block)
        return state

    def reduce_with(self, state: State, group: int) -> State:
        """Applies one group's reducer to a paused state."""
        return self.after_reduction(state, self.reducers[group](state.tokens, state.key_THK))

    def after_reduction(self, state: State, reduction: Reduction) -> State:
        """The state that goes on after a reduction."""
        record = replace(reduction, tokens=reduction.tokens.without_x())  # places are remembered, values would only fill memory
        return replace(state, tokens=reduction.tokens, key_THK=None, reductions=(*state.reductions, record))

    def run_block(self, state: State, block: int) -> State:
        """One block. Its keys are kept only where the next block's reducer asks for them."""
        following = block + 1
        wanted = following in self.config.first_blocks and self.reducers[self.config.first_blocks.index(following)].wants_keys
        attended = self.adapter.attend(block, state.tokens, wanted)
        return replace(state, tokens=self.adapter.feed(block, attended.tokens), key_THK=attended.key_THK, block=following)

    @captures_sizes
    def forward(self, images: Float[Tensor, "B C height width"]) -> Tensor:
        """Logits, as the backbone gives them."""
        return self.logits(images)

    def logits(self, images: Float[Tensor, "B C height width"]) -> Tensor:
        """As `forward`; for calls from a function compiled with `fullgraph=True`, which PyTorch lets capture sizes anyway."""
        return self.adapter.head(self.walk(self.start(images), self.adapter.depth).tokens)

    def trace(self, images: Float[Tensor, "B C height width"]) -> tuple[Tensor, Trace]:
        """Logits, and what was dropped on the way. Costs nothing beyond `forward`."""
        state = self.walk(self.start(images), self.adapter.depth)
        return self.adapter.head(state.tokens), self.make_trace(state.reductions, (images.shape[-2], images.shape[-1]))

    def make_trace(self, reductions: Sequence[Reduction], size: tuple[int, int]) -> Trace:
        """The trace of finished reductions for inputs of `size` = (height, width) in pixels."""
        entering = reductions[0].entering_B.tolist()
        kept = torch.stack([r.kept_B for r in reductions], dim=1).tolist()
        reducers = dict(zip(self.config.first_blocks, self.reducers, strict=True))
        macs = {
            key: cost.reduced_macs(self.adapter, reducers, size, key[0], key[1:])
            for key in {(n, *k) for n, k in zip(entering, kept, strict=True)}
        }
        return Trace(
            score_GBN=torch.stack([r.score_BN for r in reductions]),
            keep_GBN=torch.stack([r.keep_BN for r in reductions]),
            carrier_GBN=torch.stack([r.tokens.carrier_BN for r in reductions]),
            grid=reductions[0].before.grid,
            first_blocks=self.config.first_blocks,
            macs=tuple(macs[(n, *k)] for n, k in zip(entering, kept, strict=True)),
            dense_macs=cost.dense_macs(self.adapter, *size),
        )

    # ---- settings ---------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The score above which a patch is kept; one number, or one per group. -1 keeps all."""
        values = self.config.thresholds or (0.5,) * len(self.reducers)
        return values[0] if len(set(values)) == 1 else values

    @threshold.setter
    def threshold(self, value: float | Sequence[float]) -> None:
        values = (float(value),) * len(self.reducers) if isinstance(value, (int, float)) else tuple(map(float, value))
        self.configure(rule="threshold", thresholds=values)

    def configure(self, **changes: Any) -> None:
        """Changes `rule`, `thresholds`, `ratios` or `on_drop`; learned weights stay.

        Raises:
            ConfigError: a setting that does not exist or does not fit.
        """
        fixed = set(changes) & {"first_blocks", "interpreter"}
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))} cannot change after reduction; call iared2.reduce again")
        try:
            config = ReductionConfig.model_validate(self.config.model_dump() | changes)
        except ValidationError as error:
            raise explain_validation(error) from None
        for group, reducer in enumerate(self.reducers):
            reducer.rule, reducer.on_drop = config.keep_rule(group, self.adapter.needs_patch), config.on_drop
        self.config = config

    # ---- timm's surface ---------------------------------------------------------------------------------

    def forward_features(self, images: Float[Tensor, "B C height width"]) -> Float[Tensor, "B S D"]:
        """Normed features on the full grid: prefix tokens, then each place filled by its carrier (zero if gone)."""
        state = self.walk(self.start(images), self.adapter.depth)
        return self.adapter.norm(torch.cat(to_grid(state.tokens), dim=1)) * _alive(state.tokens)

    def forward_intermediates(
        self,
        images: Float[Tensor, "B C height width"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's: features after chosen blocks (the last n, or by number; all by default), on the full grid."""
        depth = self.adapter.depth
        last = depth if indices is None else indices
        chosen = range(depth - last, depth) if isinstance(last, int) else [i + depth if i < 0 else i for i in last]
        if not chosen or min(chosen) < 0 or max(chosen) >= depth:
            raise ConfigError(f"indices: got {indices}, wanted blocks of 0 to {depth - 1}, or how many of the last")
        state, found = self.start(images), []
        for block in range(depth):
            state = self.walk(state, block + 1)
            if block in chosen:
                prefix_BLD, patch_BND = to_grid(state.tokens)
                if norm:
                    alive_BN1 = (state.tokens.carrier_BN >= 0)[..., None]
                    prefix_BLD, patch_BND = self.adapter.norm(prefix_BLD), self.adapter.norm(patch_BND) * alive_BN1
                if output_fmt == "NCHW":
                    patch_BND = patch_BND.transpose(1, 2).unflatten(2, state.tokens.layout.grid)
                found.append((patch_BND, prefix_BLD) if return_prefix_tokens and self.adapter.prefix else patch_BND)
        if intermediates_only:
            return found
        return self.adapter.norm(torch.cat(to_grid(state.tokens), dim=1)) * _alive(state.tokens), found

    def forward_head(self, features: Float[Tensor, "B S D"], pre_logits: bool = False) -> Tensor:
        """The backbone's head on features as `forward_features` gives them."""
        return self.backbone.forward_head(features, pre_logits=pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the backbone's classifier."""
        self.backbone.reset_classifier(num_classes, global_pool)
        self.configure()  # another pooling may need a patch where none was needed

    @property
    def num_features(self) -> int:
        """Width of the features before the classifier."""
        return self.backbone.num_features

    @property
    def num_classes(self) -> int:
        """Classes of the classifier, 0 if there is none."""
        return self.backbone.num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's data configuration, so that `timm.data.resolve_model_data_config(model)` works."""
        return self.backbone.pretrained_cfg

    # ---- taking apart, saving, loading ------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The backbone itself: the same object, in which nothing was ever changed."""
        return self.backbone

    @property
    def backbone_trained(self) -> bool:
        """Whether the backbone's weights differ from those that were reduced."""
        return _fingerprint(self.backbone) != self._untouched

    def _save_pretrained(self, save_directory: Path) -> None:
        from iared2.saving import save_reduced

        save_reduced(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "ReducedTransformer":
        """Loads an embedded model (by name), a folder, or a hub id; see `iared2.saving.load_reduced` for options."""
        from iared2.saving import load_reduced

        return load_reduced(str(pretrained_model_name_or_path), **options)


def reduce(
    backbone: nn.Module,
    groups: int | Sequence[int] = 3,
    *,
    interpreter: InterpreterConfig | None = None,
    on_drop: OnDrop = "discard",
    **settings: Any,
) -> ReducedTransformer:
    """Makes a reduced model of a pretrained vision transformer. The backbone itself is not changed.

    Args:
        backbone: any timm `VisionTransformer`, or a model with a registered adapter.
        groups: how many equal groups, or the first block of each group.
        interpreter: how patches are scored.
        on_drop: "discard" dropped tokens as in the paper, or "merge" them into kept ones.
        settings: `rule`, `thresholds`, `ratios` of `ReductionConfig`.

    Raises:
        UnsupportedBackboneError: no adapter fits the backbone.
        ConfigError: groups or settings that do not fit.
    """
    adapter = adapt(backbone)
    first_blocks = even_groups(adapter.depth, groups) if isinstance(groups, int) else tuple(groups)
    values = {"first_blocks": first_blocks, "interpreter": interpreter or InterpreterConfig(), "on_drop": on_drop, **settings}
    try:
        config = ReductionConfig.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error) from None
    return ReducedTransformer(backbone, config)


def _alive(tokens: PackedTokens) -> Float[Tensor, "B S 1"]:
    """One where a feature stands, zero where the patch is gone: a norm would turn zeros into its bias."""
    alive_BN = (tokens.carrier_BN >= 0).to(tokens.x_TD.dtype)
    return torch.nn.functional.pad(alive_BN, (tokens.layout.prefix, 0), value=1.0)[..., None]


def _fingerprint(module: nn.Module) -> tuple[tuple[str, float, float], ...]:
    """Cheap figures per parameter that any training step changes. Sums alone may not: a classifier's gradients add up to zero."""
    with torch.no_grad():
        values = ((name, p.double()) for name, p in module.named_parameters() if p.device.type != "meta")
        return tuple((name, float(x.sum()), float(x.square().sum())) for name, x in values)
