"""Settings of a reduction whose interpreters are trained together, to a budget that the user names."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from iared2.budget import parse_budget
from iared2.errors import ConfigError
from iared2.handover import OnDrop, Similarity, Weights
from iared2.interpreter import InterpreterConfig
from iared2.settings import Settings
from iared2.train.optim import OptimSettings, Whole
from iared2.worth import WorthConfig

# What a reduced model to start from has decided.
OF_THE_START = ("blocks", "place", "interpreter", "worth", "on_drop", "keep_length", "similarity", "weights")


class WalkSettings(Settings):
    """How whole walks are rewarded and compared (REINFORCE)."""

    samples: int = Field(4, ge=2, description="walks per picture; each is compared with the others")
    price: float = Field(0.3, gt=0, description="first price of the dense model's multiply-adds, in units of agreement")
    steering: float = Field(0.5, ge=0, description="how fast the price follows the budget; 0 leaves it")
    labels: bool = Field(False, description="reward the probability of the label instead of agreement with the dense model")
    normalise_advantage: bool = Field(False, description="divide advantages by their standard deviation over the batch")
    entropy_bonus: float = Field(0.0, ge=0)


class TogetherSettings(Settings):
    """Many small reductions, trained along one walk: imitation, then REINFORCE, then (if asked for) the blocks themselves."""

    target: str = Field("0.65x", description="budget per image: 0.65x or 65%, 0.8G, 800M, or 9ms on this device")
    start: str | None = Field(
        None, min_length=1, description="a reduced model to go on from (embedded name, folder or hub id); None: new interpreters"
    )
    blocks: tuple[Whole, ...] | None = Field(None, description="blocks that reduce; None: up to five, the last at 3/4 of the depth")
    place: Literal["before", "between"] = Field("between", description="before those blocks, or between their halves")
    interpreter: InterpreterConfig = InterpreterConfig(policy="class", context=True, init_score=0.2)
    worth: WorthConfig | None = WorthConfig()
    on_drop: OnDrop = "merge"
    keep_length: bool = Field(True, description="merged tokens keep the average length of their parts")
    similarity: Similarity = Field("tokens", description="tokens are compared by keys, or as the next half of the block reads them")
    weights: Weights = Field(
        "score", description="parts of a merged token count by their patches, by those times their scores, or not at all"
    )
    skip_unread: bool = Field(True, description="where the head reads prefix tokens alone, the last block computes no others; exact")
    second_look: float = Field(
        0.0, ge=0, lt=1, description="share of pictures to pass again with nothing dropped, those of the smallest margins; the budget pays"
    )
    against: float = Field(0.3, ge=0, description="how much evidence against the predicted class counts")
    blur: float = Field(
        0.0, ge=0, le=100, description="blur of the evidence to imitate: standard deviation in patches; what is left gathers"
    )
    remember: bool = Field(True, description="compute the dense model's evidence once per picture; needs pictures without augmentation")
    imitation_epochs: Whole = Field(1, ge=0)
    walk_epochs: Whole = Field(1, ge=0)
    block_epochs: Whole = Field(0, ge=0, description="fine-tuning of the blocks; 0 leaves them untouched")
    block_target: Literal["label", "dense"] = Field("dense", description="cross-entropy, or distillation from the dense model")
    block_first: Whole | None = Field(
        None, ge=0, description="first block that learns, from 0; None: the first that reduces; their number: norm and head alone"
    )
    train_head: bool = Field(True, description="fine-tune final norm and head with the blocks")
    block_share: float = Field(
        1.0, gt=0, le=1, description="how far blocks go from their old weights to the fine-tuned ones; after large steps, 0.5 forgets less"
    )
    walk: WalkSettings = WalkSettings()
    imitation_optim: OptimSettings = OptimSettings(lr=1e-3, lr_batch=32)
    walk_optim: OptimSettings = OptimSettings(lr=3e-4, lr_batch=32)
    block_optim: OptimSettings = OptimSettings(lr=1e-5, lr_batch=32)

    @field_validator("target")
    @classmethod
    def _is_a_budget(cls, text: str) -> str:
        try:
            parse_budget(text)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return text

    @model_validator(mode="after")
    def _something_is_trained(self) -> "TogetherSettings":
        if not (self.imitation_epochs or self.walk_epochs or self.block_epochs):
            raise ValueError("imitation_epochs, walk_epochs, block_epochs: got 0 for all, so nothing would be trained; raise one")
        return self

    @model_validator(mode="after")
    def _a_start_brings_its_own(self) -> "TogetherSettings":
        fields = type(self).model_fields
        named = ", ".join(name for name in OF_THE_START if getattr(self, name) != fields[name].default)
        if self.start is not None and named:
            raise ValueError(f"start: got {self.start!r}, a reduced model with its own {named}; leave {named} out, or the start")
        return self

    @model_validator(mode="after")
    def _what_is_set_is_done(self) -> "TogetherSettings":
        of_blocks = {
            "block_target": self.block_target != "dense",
            "block_first": self.block_first is not None,
            "train_head": not self.train_head,
            "block_share": self.block_share != 1,
        }
        of_walks = {f"walk.{name}": getattr(self.walk, name) != field.default for name, field in WalkSettings.model_fields.items()}
        for epochs, usual, asked in (("block_epochs", 3, of_blocks), ("walk_epochs", 1, of_walks)):
            named = ", ".join(name for name, is_set in asked.items() if is_set)
            if named and not getattr(self, epochs):
                raise ValueError(f"{epochs}: got 0, so {named} would do nothing; set together.{epochs}={usual}, or leave {named} out")
        return self
