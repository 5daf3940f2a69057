"""Recipes: complete, typed descriptions of a run. A recipe is a function; its docstring names cost, expected result and command."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from iared2.errors import ConfigError
from iared2.handover import OnDrop
from iared2.interpreter import InterpreterConfig
from iared2.reward import EstimatorConfig, RewardConfig
from iared2.settings import Settings, explain_validation, unknown_key
from iared2.train.gumbel_settings import GumbelSettings
from iared2.train.optim import OptimSettings, Whole
from iared2.train.overrides import parse_overrides, put
from iared2.train.together_settings import OF_THE_START, TogetherSettings

Share = Annotated[float, Field(gt=0, le=1)]


class BackboneSettings(Settings):
    """Which backbone, and where its weights come from."""

    model: str = Field(description="a timm model name")
    weights: str | None = Field(None, description="a safetensors file; None fetches timm's, unless trained from scratch")
    resample_positions: bool = Field(False, description="interpolate the weights' position embeddings to this model's grid")
    arguments: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class DataSettings(Settings):
    """Which pictures, and how they are fed."""

    train: str | None = Field(None, description="folder, archive or timm data name; --data on the command line")
    train_split: str = "train"
    labels: bool = Field(True, description="false: labels are not needed, and a plain folder of pictures will do")
    val: str | None = Field(None, description="held-out data; None takes `held_out` pictures away from training")
    val_split: str = "val"
    held_out: Whole = Field(0, ge=0, description="pictures taken from the training data to watch the run")
    held_out_share: Share = Field(1.0, description="at most this share of the training data is held out, however few pictures there are")
    val_subset: Whole | None = Field(1000, gt=0, description="pictures of the held-out data used while training")
    subset: Whole | None = Field(None, gt=0, description="a fixed random subset of the training data")
    batch_size: Whole = Field(32, gt=0, description="per device")
    min_scale: float = Field(0.6, gt=0, le=1, description="smallest share of a picture's area in a random crop")
    flip: bool = True
    views: Whole = Field(0, ge=0, description="fixed random crops kept of each training picture in memory, besides the picture")
    view_min_scale: float = Field(0.4, gt=0, le=1, description="smallest share of a picture's area in such a crop")
    in_memory: bool = Field(False, description="decode every picture once and keep it as uint8")


class TeacherSettings(Settings):
    """Soft labels for training from scratch; logits are computed once, on the whole picture."""

    model: str = "deit_tiny_patch16_224.fb_in1k"
    weights: str | None = None
    image_size: Whole = Field(160, gt=0)
    weight: float = Field(0.7, ge=0, le=1, description="share of the teacher's term in the loss")
    temperature: float = Field(2.0, gt=0)


class DenseSettings(Settings):
    """Training a dense ViT from scratch."""

    epochs: Whole = Field(gt=0)
    patch_drop: tuple[float, ...] = Field((), description="share of patches dropped at random, per epoch")
    smoothing: float = Field(0.1, ge=0, lt=1)
    teacher: TeacherSettings | None = None
    optim: OptimSettings = OptimSettings(
        optimizer="muon", lr=3e-3, lr_batch=128, schedule="trapezoid", warmup=0.05, weight_decay=0.05, betas=(0.9, 0.98)
    )


class ReductionSettings(Settings):
    """The curriculum of Algorithm 1 and what it trains."""

    groups: Whole | tuple[Whole, ...] = Field(3, description="how many even groups, or the first block of each")
    interpreter: InterpreterConfig = InterpreterConfig()
    reward: RewardConfig = RewardConfig()
    error_penalties: tuple[float, ...] = Field((), description="tau of each group; empty takes reward.error_penalty everywhere")
    estimator: EstimatorConfig = EstimatorConfig()
    interpreter_method: Literal["reinforce", "gumbel"] = Field("reinforce", description="appendix D compares the two")
    gumbel: GumbelSettings = GumbelSettings()
    on_drop: OnDrop = "discard"
    interpreter_epochs: Whole = Field(10, ge=0)
    block_epochs: Whole = Field(20, ge=0, description="0 trains interpreters only")
    warm_start_epochs: float = Field(
        0, ge=0, le=1e6, strict=True, description="imitation before REINFORCE; not in the paper; 0.25: a quarter"
    )
    warm_start_ratios: tuple[Share, ...] = Field((), description="share of the grid that imitation keeps, per group")
    warm_start_sharpness: float = Field(1.0, ge=1, description="how many times steeper than probabilities scores become in imitation")
    warm_start_blur: float = Field(0.0, ge=0, le=100, description="blur of the evidence to imitate: standard deviation in patches")
    entropy_bonus: float = Field(0.0, ge=0)
    cache_prefix: bool = Field(False, description="compute each picture's frozen prefix once; needs pictures without augmentation")
    train_head: bool = Field(True, description="train final norm and head with the blocks")
    block_target: Literal["label", "dense"] = Field("label", description="cross-entropy, or distillation from the dense model")
    warm_start_optim: OptimSettings = OptimSettings(lr=1e-3, lr_batch=32)
    interpreter_optim: OptimSettings = OptimSettings()
    block_optim: OptimSettings = OptimSettings()

    @model_validator(mode="after")
    def _ratios_fit(self) -> "ReductionSettings":
        count = self.groups if isinstance(self.groups, int) else len(self.groups)
        if self.warm_start_epochs and len(self.warm_start_ratios) != count:
            raise ValueError(f"warm_start_ratios: got {len(self.warm_start_ratios)}, wanted one for each of {count} groups")
        if self.error_penalties and len(self.error_penalties) != count:
            raise ValueError(f"error_penalties: got {len(self.error_penalties)}, wanted one for each of {count} groups")
        return self

    def reward_of(self, group: int) -> RewardConfig:
        """The reward of one group's interpreter."""
        if not self.error_penalties:
            return self.reward
        return self.reward.model_copy(update={"error_penalty": self.error_penalties[group]})

    @model_validator(mode="after")
    def _gumbel_masks_what_is_discarded(self) -> "ReductionSettings":
        if self.interpreter_method == "gumbel" and self.on_drop != "discard":
            raise ValueError(
                f"interpreter_method: got 'gumbel' with on_drop={self.on_drop!r}, but its masked pass discards; set on_drop=discard"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> "ReductionSettings":
        if not (self.interpreter_epochs or self.block_epochs or self.warm_start_epochs):
            raise ValueError("interpreter_epochs, block_epochs, warm_start_epochs: got 0 for all, so nothing would be trained; raise one")
        return self


class Recipe(Settings):
    """A whole run: a backbone, data, and a dense training, a reduction (group by group, or together), or both."""

    name: str
    backbone: BackboneSettings
    data: DataSettings = DataSettings()
    dense: DenseSettings | None = None
    reduction: ReductionSettings | None = None
    together: TogetherSettings | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Whole = Field(0, ge=0)
    checkpoint_every: Whole = Field(500, gt=0, description="steps")
    log_every: Whole = Field(50, gt=0, description="steps")

    @model_validator(mode="after")
    def _cache_needs_fixed_pictures(self) -> "Recipe":
        if self.reduction is not None and self.reduction.cache_prefix and (self.data.flip or self.data.min_scale < 1):
            raise ValueError("reduction.cache_prefix: needs pictures without augmentation; set data.flip=false and data.min_scale=1")
        return self

    @model_validator(mode="after")
    def _labels_where_they_are_needed(self) -> "Recipe":
        if self.data.labels:
            return self
        needs = "dense" if self.dense is not None else None
        if self.reduction is not None and self.reduction.reward.target == "label" and self.reduction.interpreter_epochs:
            needs = "reduction.reward.target=label"
        if self.reduction is not None and self.reduction.block_epochs and self.reduction.block_target == "label":
            needs = "reduction.block_target=label"
        if self.together is not None and self.together.walk.labels and self.together.walk_epochs:
            needs = "together.walk.labels"
        if self.together is not None and self.together.block_target == "label" and self.together.block_epochs:
            needs = "together.block_target=label"
        if needs:
            raise ValueError(f"data.labels: got false, but {needs} needs labels; give labelled data, or take the dense model as the goal")
        return self

    @model_validator(mode="after")
    def _memory_needs_fixed_pictures(self) -> "Recipe":
        if self.together is not None and self.together.remember and (self.data.flip or self.data.min_scale < 1):
            raise ValueError("together.remember: needs pictures without augmentation; set data.flip=false and data.min_scale=1")
        if self.together is not None and self.reduction is not None:
            raise ValueError("reduction, together: got both, wanted one of them; set the other to null")
        return self

    @model_validator(mode="after")
    def _a_start_has_its_backbone(self) -> "Recipe":
        if self.together is None or self.together.start is None:
            return self
        changes = {"dense": self.dense is not None, "backbone.arguments": bool(self.backbone.arguments)}
        changes["backbone.resample_positions"] = self.backbone.resample_positions
        named = ", ".join(name for name, is_set in changes.items() if is_set)
        if named:
            raise ValueError(f"together.start: got {self.together.start!r}, which brings its own backbone; leave out {named}")
        return self


RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(build: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Registers a recipe under its function's name."""
    RECIPES[build.__name__] = build
    return build


def _paper(name: str, model: str) -> Recipe:
    """Algorithm 1 with the paper's settings; the two recipes differ in the backbone alone."""
    reduction = ReductionSettings(interpreter=InterpreterConfig.paper(), train_head=False)
    return Recipe(name=name, backbone=BackboneSettings(model=model), reduction=reduction)


@recipe
def paper_deit_small() -> Recipe:
    """DeiT-S on ImageNet-1k to the letter of the paper (Algorithm 1, Eq. 1 to 3, Table 2).

    Cost: 4.5 hours on 24 V100 in the paper; not run here.
    Expected: 79.1 % top-1 at 2.9 G (linear layers only; the paper's figure, not reproduced here).
    Command: iared2 train paper_deit_small --data IMAGENET_FOLDER --output runs/deit_small
    """
    return _paper("paper_deit_small", "deit_small_patch16_224.fb_in1k")


@recipe
def paper_deit_base() -> Recipe:
    """DeiT-B on ImageNet-1k to the letter of the paper.

    Cost: not stated in the paper; not run here.
    Expected: 80.9 % top-1 at 11.8 G (linear layers only; the paper's figure, not reproduced here).
    Command: iared2 train paper_deit_base --data IMAGENET_FOLDER --output runs/deit_base
    """
    return _paper("paper_deit_base", "deit_base_patch16_224.fb_in1k")


@recipe
def mini_dense() -> Recipe:
    """The embedded model's backbone, from scratch on Tiny-ImageNet-200 with soft labels of DeiT-Tiny.

    Cost: about 60 minutes on two CPU cores, 12 of them for the teacher's logits.
    Expected: see the embedded model's card.
    Command: iared2 train mini_dense --data TINY_IMAGENET_FOLDER --dense.teacher.weights=DEIT_TINY_FILE --output runs/mini_dense
    """
    dense = DenseSettings(epochs=4, patch_drop=(0.5, 0.5, 0.4, 0.25), teacher=TeacherSettings())
    return Recipe(
        name="mini_dense",
        backbone=BackboneSettings(model="iared2_mini_patch8_64"),
        data=DataSettings(batch_size=128, min_scale=0.7),
        dense=dense,
        precision="bf16",
        log_every=100,
    )


@recipe
def mini_finer() -> Recipe:
    """The backbone of `mini_dense` goes on with 12x12 instead of 8x8 tokens.

    Cost: about 60 minutes on two CPU cores (and 12 for the teacher's logits, unless those of `mini_dense` are copied).
    Expected: see the embedded model's card.
    Command: iared2 train mini_finer --data TINY_IMAGENET_FOLDER --weights runs/mini_dense/backbone.safetensors
        --dense.teacher.weights=DEIT_TINY_FILE --output runs/mini_finer
    """
    optim = OptimSettings(
        optimizer="muon", lr=2e-3, lr_batch=128, schedule="trapezoid", warmup=0.03, decay=0.6, weight_decay=0.05, betas=(0.9, 0.98)
    )
    return Recipe(
        name="mini_finer",
        backbone=BackboneSettings(model="iared2_mini_patch8_96", resample_positions=True),
        data=DataSettings(batch_size=128, min_scale=0.7),
        dense=DenseSettings(epochs=5, patch_drop=(0.5, 0.5, 0.5, 0.4, 0.25), teacher=TeacherSettings(), optim=optim),
        precision="bf16",
        log_every=100,
    )


@recipe
def mini_reduced() -> Recipe:
    """The embedded model: the curriculum over the backbone of `mini_finer`, short and with a warm start.

    Cost: about 20 minutes on two CPU cores.
    Expected: see the embedded model's card.
    Command: iared2 train mini_reduced --data TINY_IMAGENET_FOLDER --weights runs/mini_finer/backbone.safetensors --output runs/mini
    """
    reduction = ReductionSettings(
        interpreter=InterpreterConfig(policy="class"),
        interpreter_epochs=1,
        block_epochs=1,
        warm_start_epochs=1,
        warm_start_ratios=(0.9, 0.45, 0.25),
        warm_start_sharpness=4.0,
        warm_start_blur=1.5,
        reward=RewardConfig(target="dense", soft=True),
        on_drop="merge",
        block_target="dense",
        warm_start_optim=OptimSettings(lr=1e-3, lr_batch=32),
        interpreter_optim=OptimSettings(lr=1e-4, lr_batch=32),
        block_optim=OptimSettings(lr=1e-4, lr_batch=32),
    )
    return Recipe(
        name="mini_reduced",
        backbone=BackboneSettings(model="iared2_mini_patch8_96"),
        data=DataSettings(batch_size=32, min_scale=0.7, subset=6000),
        reduction=reduction,
        precision="bf16",
    )


@recipe
def deit_tiny_interpreters() -> Recipe:
    """Interpreters for an untouched DeiT-Tiny from 1,000 unlabelled photos, handing over what they drop.

    Cost: about 15 minutes on two CPU cores.
    Expected: see the embedded interpreters' card.
    Command: iared2 train deit_tiny_interpreters --data FOLDER --weights DEIT_TINY_FILE --output runs/deit_tiny
    """
    reduction = ReductionSettings(
        groups=(4, 6, 8, 10),
        interpreter=InterpreterConfig(policy="class", start="attention"),
        reward=RewardConfig(target="dense", soft=True, error_penalty=3.0),
        on_drop="merge",
        interpreter_epochs=1,
        block_epochs=0,
        warm_start_epochs=1,
        warm_start_ratios=(0.75, 0.55, 0.4, 0.25),
        warm_start_sharpness=3.0,
        cache_prefix=True,
        warm_start_optim=OptimSettings(lr=5e-5, lr_batch=32),
        interpreter_optim=OptimSettings(lr=5e-5, lr_batch=32),
    )
    return Recipe(
        name="deit_tiny_interpreters",
        backbone=BackboneSettings(model="deit_tiny_patch16_224.fb_in1k"),
        data=DataSettings(batch_size=32, in_memory=True, held_out=200, flip=False, min_scale=1.0, views=3),
        reduction=reduction,
        precision="bf16",
        log_every=25,
    )


@recipe
def budget() -> Recipe:
    """Any ViT, any budget, photos without labels: many small reductions trained together. What `--target-macs` runs.

    Cost: about 6 minutes on two CPU cores for DeiT-Tiny and 1,000 photos.
    Expected: see docs/results.md.
    Command: iared2 train budget --target-macs 0.65x --data FOLDER --model deit_tiny_patch16_224 --output runs/budget
    """
    return Recipe(
        name="budget",
        backbone=BackboneSettings(model="deit_tiny_patch16_224.fb_in1k"),
        data=DataSettings(
            batch_size=32, in_memory=True, labels=False, held_out=200, held_out_share=0.2, subset=1000, flip=False, min_scale=1.0, views=3
        ),
        together=TogetherSettings(),
        precision="bf16",
        log_every=25,
    )


def find_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe by name, with `section.field=value` overrides applied and validated.

    Raises:
        ConfigError: an unknown recipe or field (answered with the nearest right one), or a value that does not fit.
    """
    if name not in RECIPES:
        raise ConfigError(unknown_key(name, list(RECIPES)).replace("setting", "recipe"))
    values, pairs = RECIPES[name]().model_dump(mode="json"), parse_overrides(list(overrides))
    for path, value in pairs:
        put(values, path.split("."), value)
    try:
        found = Recipe.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error) from None
    if found.together is not None and found.together.start is not None:
        # Even at its usual value: the start's may be another.
        settings = {f"together.{name}" for name in OF_THE_START}
        named = [path for path, _ in pairs if ".".join(path.split(".")[:2]) in settings]
        if named:
            raise ConfigError(f"together.start: {found.together.start} is a reduced model with its own settings; leave out {named[0]}")
    return found
