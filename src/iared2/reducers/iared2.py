"""The paper's reducer: a multi-head interpreter, a keep rule, and a hand-over."""

from jaxtyping import Float
from torch import Tensor

from iared2.handover import OnDrop, hand_over, matching_macs
from iared2.interpreter import Interpreter
from iared2.keep import KeepRule
from iared2.reducers.base import Reducer, Reduction
from iared2.tokens.packed import PackedTokens
from iared2.worth import Worth


class InterpreterReducer(Reducer):
    """Scores patches with an interpreter (Eq. 1), keeps some, and hands over the rest.

    Attributes:
        interpreter: the scorer.
        worth: makes chances of scores; None lets the rule act on the score itself, as the paper does.
        rule: the keep rule; may be replaced at any time.
        on_drop: "discard" or "merge".
        keep_length: whether merged tokens keep the average length of their parts.
    """

    def __init__(
        self, interpreter: Interpreter, rule: KeepRule, on_drop: OnDrop, worth: Worth | None = None, keep_length: bool = False
    ) -> None:
        super().__init__()
        self.interpreter, self.rule, self.on_drop, self.worth = interpreter, rule, on_drop, worth
        self.keep_length = keep_length

    @property
    def wants_keys(self) -> bool:  # type: ignore[override]
        return self.merges or (self.worth is not None and self.worth.compares)

    @property
    def wants_class(self) -> bool:  # type: ignore[override]
        return self.interpreter.config.context

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.on_drop == "merge"

    def forward(
        self, tokens: PackedTokens, key_THK: Float[Tensor, "T H K"] | None, class_TH: Float[Tensor, "T H"] | None = None
    ) -> Reduction:
        score_T = self.interpreter(tokens, class_TH)
        return self.apply_rule(self.rule, score_T, tokens, key_THK, self.chance(score_T, tokens, key_THK))

    def chance(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, key_THK: Tensor | None) -> Float[Tensor, " T"]:
        """What rules act on: the score, or what a token of that score is worth."""
        return score_T if self.worth is None else self.worth(score_T, tokens, None if key_THK is None else key_THK.flatten(1))

    def apply_rule(
        self,
        rule: KeepRule,
        score_T: Float[Tensor, " T"],
        tokens: PackedTokens,
        key_THK: Tensor | None,
        chance_T: Float[Tensor, " T"] | None = None,
    ) -> Reduction:
        """The reduction that `rule` makes of given chances, or of the scores (training applies several rules to the same scores)."""
        chosen = rule(score_T if chance_T is None else chance_T, tokens.layout)
        features = None if key_THK is None else key_THK.flatten(1)
        return Reduction(tokens.layout, score_T, chosen, hand_over(tokens, chosen, self.on_drop, features, self.keep_length), chance_T)

    def macs(self, entering: int, kept: int) -> int:
        width = self.interpreter.width
        matching = matching_macs(entering - kept, kept, width) if self.merges else 0
        comparing = 0 if self.worth is None else self.worth.macs(entering, width)
        return self.interpreter.macs(entering) + matching + comparing
