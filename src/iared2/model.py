"""The reduced transformer: logits and trace of a walk through a backbone, settings, saving. Everything learned lives in reducers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from jaxtyping import Bool, Float
from pydantic import ValidationError
from torch import Tensor, nn

from iared2 import cost
from iared2.backbones import adapt
from iared2.compiling import between_graphs, captures_sizes
from iared2.errors import ConfigError
from iared2.features import TimmSurface
from iared2.handover import OnDrop
from iared2.interpreter import Interpreter, InterpreterConfig
from iared2.reducers.base import Reduction
from iared2.reducers.iared2 import InterpreterReducer
from iared2.reduction import ReductionConfig, group_starts
from iared2.settings import explain_validation
from iared2.tokens.packed import pick_images
from iared2.trace import Trace
from iared2.walk import State
from iared2.worth import Worth


@dataclass(frozen=True)
class Answer:
    """Logits (or what else the head gives), the first pass that led to them, and which pictures were passed again."""

    logits: Float[Tensor, "B *answer"]
    state: State
    again_B: Bool[Tensor, " B"]


class ReducedTransformer(TimmSurface, ModelHubMixin):
    """A vision transformer that drops patches group by group. Made by `iared2.reduce` or `from_pretrained`.

    Example:
        >>> import iared2, timm, torch
        >>> model = iared2.reduce(timm.create_model("deit_tiny_patch16_224"), groups=3).eval()
        >>> logits, trace = model.trace(torch.zeros(1, 3, 224, 224))
        >>> trace.heatmap(1).shape
        torch.Size([1, 14, 14])
    """

    def __init__(self, backbone: nn.Module, config: ReductionConfig) -> None:
        super().__init__()
        self.adapter = adapt(backbone)
        self.backbone = backbone
        if config.first_blocks[-1] >= self.adapter.depth:
            last = self.adapter.depth - 1
            raise ConfigError(f"first_blocks: got block {config.first_blocks[-1]}, but the backbone has blocks 0 to {last}")
        if config.interpreter.policy == "class" and not self.adapter.has_class_token:
            raise ConfigError("interpreter: policy='class' needs a class token, which this backbone lacks; use policy='learned'")
        if config.interpreter.context and not self.adapter.gives_class_logits:
            raise ConfigError("interpreter: context=true needs plain attention with a class token, which this backbone lacks; leave it out")
        if config.interpreter.context and config.place == "before" and config.first_blocks[0] == 0:
            raise ConfigError("interpreter: context=true needs attention before the first reduction; reduce from block 1 on, or between")
        if config.place == "between" and not all(self.adapter.splits[block] for block in config.first_blocks):
            raise ConfigError("place: got 'between', but a block of this backbone runs attention and FFN side by side; use 'before'")
        heads = config.interpreter.heads or self.adapter.heads
        if config.interpreter.context and heads != self.adapter.heads:
            wanted = f"got {heads} heads, wanted {self.adapter.heads}"
            raise ConfigError(f"interpreter: context=true adds one logit per head of attention; {wanted}")
        self._check_second_look(config)
        device = next(backbone.parameters()).device
        self.reducers = nn.ModuleList()
        for group in range(len(config.first_blocks)):
            interpreter = Interpreter(self.adapter.width, heads, config.interpreter).to(device)
            rule = config.keep_rule(group, self.adapter.needs_patch)
            worth = None if config.worth is None else Worth(config.worth.of_group(group)).to(device)
            self.reducers.append(InterpreterReducer(interpreter, rule, config.on_drop, worth, config.merging))
        self.config = config
        self.labels: list[str] | None = None  # class names, where the model knows them
        self.files: tuple[Path, ...] = ()  # the weights files it was loaded from
        self._untouched = _fingerprint(backbone)

    @captures_sizes
    def forward(self, images: Float[Tensor, "B C height width"]) -> Tensor:
        """Logits, as the backbone gives them."""
        return self.answer(images).logits if self.looks_again else self.logits(images)

    def logits(self, images: Float[Tensor, "B C height width"]) -> Tensor:
        """As `forward`, in one pass whatever `second_look` says.

        For fine-tuning, and for calls from a function compiled with `fullgraph=True`, which PyTorch lets capture sizes anyway.
        """
        return self.adapter.head(self.finish(self.start(images)).tokens)

    @between_graphs
    def answer(self, images: Float[Tensor, "B C height width"]) -> Answer:
        """What `forward` does: one pass, and another for those pictures that `second_look` asks it for."""
        ahead = self.walk_to(self.start(images), 0, reduce=())
        return self.conclude(ahead, self.finish(ahead))

    @between_graphs
    def conclude(self, ahead: State, state: State) -> Answer:
        """The answer of a finished pass, with a second look where it leaves a picture's class open.

        Both passes share what runs in front of the first reduction. The second drops nothing: its answer is the backbone's own.

        Args:
            ahead: the pass paused in front of its first reduction.
            state: the same pass, finished.
        """
        logits = self.adapter.head(state.tokens)
        if not self.looks_again:
            return Answer(logits, state, torch.zeros(len(logits), dtype=torch.bool, device=logits.device))
        again_B = margin(logits) <= self.config.second_look
        index_I = again_B.nonzero().squeeze(1)
        if len(index_I):
            tokens = self.finish_dense(replace(ahead, tokens=pick_images(ahead.tokens, index_I)))
            logits = logits.index_copy(0, index_I, self.adapter.head(tokens))
        return Answer(logits, state, again_B)

    def trace(self, images: Float[Tensor, "B C height width"], second_look: bool = True) -> tuple[Tensor, Trace]:
        """Logits, and what was dropped on the way. Costs no pass beyond those of `forward`.

        Args:
            second_look: whether pictures are looked at again, if that is set; scores and kept patches are those of the first pass.
        """
        ahead = self.walk_to(self.start(images), 0, reduce=())
        state, size = self.finish(ahead), (images.shape[-2], images.shape[-1])
        if not second_look:
            return self.adapter.head(state.tokens), self.make_trace(state.reductions, size)
        answer = self.conclude(ahead, state)
        return answer.logits, self.make_trace(state.reductions, size, answer.again_B)

    def make_trace(self, reductions: Sequence[Reduction], size: tuple[int, int], again_B: Bool[Tensor, " B"] | None = None) -> Trace:
        """The trace of finished reductions for inputs of `size` = (height, width) in pixels, of which `again_B` were looked at again."""
        entering = reductions[0].entering_B.tolist()
        again = [False] * len(entering) if again_B is None else again_B.tolist()
        kept = torch.stack([r.kept_B for r in reductions], dim=1).tolist()
        keys = list(zip(entering, map(tuple, kept), again, strict=True))
        second = {n: self.second_look_macs(size, n) for n in set(entering)} if any(again) else {}
        macs = {(n, k, twice): self.macs(size, n, k) + (second[n] if twice else 0) for n, k, twice in set(keys)}
        return Trace(
            score_GBN=torch.stack([r.score_BN for r in reductions]),
            keep_GBN=torch.stack([r.keep_BN for r in reductions]),
            carrier_GBN=torch.stack([r.tokens.carrier_BN for r in reductions]),
            grid=reductions[0].before.grid,
            first_blocks=self.config.first_blocks,
            macs=tuple(macs[key] for key in keys),
            dense_macs=cost.dense_macs(self.adapter, *size),
            again=tuple(again),
        )

    def macs(self, size: tuple[int, int], patches: int, kept: Sequence[int], products: bool = True, until: int | None = None) -> int:
        """Multiply-adds of one pass of one image of `size` = (height, width) pixels; see `cost.reduced_macs`."""
        reducers = dict(zip(self.config.first_blocks, self.reducers, strict=True))
        between = self.config.place == "between"
        return cost.reduced_macs(self.adapter, reducers, size, patches, kept, products, between, until, self.skips_unread)

    def second_look_macs(self, size: tuple[int, int], patches: int, products: bool = True) -> int:
        """Multiply-adds of a second look at one image of `size` = (height, width) pixels; see `cost.second_look_macs`."""
        first, between = self.config.first_blocks[0], self.config.place == "between"
        return cost.second_look_macs(self.adapter, first, size, patches, products, between, self.skips_unread)

    # ---- settings ---------------------------------------------------------------------------------------

    @property
    def looks_again(self) -> bool:
        """Whether pictures of which the first pass is unsure are passed again; never in training."""
        return self.config.second_look > 0 and not self.training

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The score above which a patch is kept; one number, or one per group. -1 keeps all."""
        values = self.config.thresholds or (0.5,) * len(self.reducers)
        return values[0] if len(set(values)) == 1 else values

    @threshold.setter
    def threshold(self, value: Any) -> None:  # whatever becomes a float, or several
        try:
            values = tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),) * len(self.reducers)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"threshold: got {value!r}, wanted a number, or one for each of {len(self.reducers)} groups") from None
        self.configure(rule="threshold", thresholds=values)

    def configure(self, **changes: Any) -> None:
        """Changes `rule`, `thresholds`, `ratios`, `second_look`, or how what is dropped is handed over; learned weights stay.

        Raises:
            ConfigError: a setting that does not exist or does not fit.
        """
        fixed = set(changes) & {"first_blocks", "interpreter", "place", "worth"}
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))} cannot change after reduction; call iared2.reduce again")
        try:
            config = ReductionConfig.model_validate(self.config.model_dump() | changes)
        except ValidationError as error:
            raise explain_validation(error) from None
        self._check_second_look(config)
        if set(changes) - {"second_look", "skip_unread"}:  # which are no business of reducers, and those may be others' by now
            rules = [config.keep_rule(group, self.adapter.needs_patch) for group in range(len(self.reducers))]
            for reducer, rule in zip(self.reducers, rules, strict=True):
                reducer.rule, reducer.on_drop, reducer.merging = rule, config.on_drop, config.merging
        self.config = config

    def _check_second_look(self, config: ReductionConfig) -> None:
        if config.second_look and not self.names_classes:
            raise ConfigError(f"second_look: got {config.second_look:g}, but this model names no class to be unsure of; leave it at 0")

    # ---- taking apart, saving, loading ------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The backbone itself: the same object, in which nothing was ever changed."""
        return self.backbone

    @property
    def backbone_trained(self) -> bool:
        """Whether the backbone's weights differ from those that were reduced; another dtype counts, another device does not."""
        return _fingerprint(self.backbone) != self._untouched

    def _save_pretrained(self, save_directory: Path) -> None:
        from iared2.saving import save_reduced

        save_reduced(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "ReducedTransformer":
        """Loads an embedded model (by name), a folder, or a hub id; see `iared2.saving.load_reduced` for options."""
        from iared2.saving import load_reduced

        return load_reduced(pretrained_model_name_or_path, **options)


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
        on_drop: "discard" dropped tokens as in the paper, "merge" them into kept ones, or "fuse" them into one summary token.
        settings: `place`, `worth`, `keep_length`, `similarity`, `weights`, `rule`, `thresholds`, `ratios`, `skip_unread`,
            `second_look` of `ReductionConfig`.

    Raises:
        UnsupportedBackboneError: no adapter fits the backbone.
        ConfigError: groups or settings that do not fit.
    """
    adapter = adapt(backbone)
    if "first_blocks" in settings:
        raise ConfigError("first_blocks: give the first block of each group as groups=(...)")
    first_blocks = group_starts(adapter.depth, groups)
    values = {"first_blocks": first_blocks, "interpreter": interpreter or InterpreterConfig(), "on_drop": on_drop, **settings}
    try:
        config = ReductionConfig.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error) from None
    model = ReducedTransformer(backbone, config)
    if config.interpreter.start == "attention":
        for block, reducer in zip(first_blocks, model.reducers, strict=True):
            attention = adapter.class_attention(block)
            if attention is None:
                raise ConfigError(f"interpreter: block {block} has no plain attention to start from; use start='small'")
            reducer.interpreter.start_from(attention)
    return model


def margin(logits: Float[Tensor, "B classes"]) -> Float[Tensor, " B"]:
    """How far apart the two likeliest classes lie, in probability: 0 where they are level, 1 where there is no doubt."""
    first_B, second_B = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first_B - second_B


def _fingerprint(module: nn.Module) -> str:
    """A hash of everything that is saved of a module: bits, so that neither threads nor devices matter, as they do to sums of floats."""
    digest = hashlib.blake2b()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            if not value.is_meta:  # there are no bits then
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
