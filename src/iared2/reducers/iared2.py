"""The paper's reducer: a multi-head interpreter, a keep rule, and a hand-over."""

from jaxtyping import Float
from torch import Tensor

from iared2.handover import PLAIN, Judged, Merging, OnDrop, comparing_macs, hand_over
from iared2.interpreter import Interpreter
from iared2.keep import KeepRule
from iared2.reducers.base import Reducer, Reduction
from iared2.similarity import compare
from iared2.tokens.packed import PackedTokens
from iared2.worth import Worth


class InterpreterReducer(Reducer):
    """Scores patches with an interpreter (Eq. 1), keeps some, and hands over the rest.

    Attributes:
        interpreter: the scorer.
        worth: makes chances of scores; None lets the rule act on the score itself, as the paper does.
        rule: the keep rule; may be replaced at any time.
        on_drop: "discard", "merge" or "fuse".
        merging: how dropped tokens are merged.
    """

    def __init__(
        self, interpreter: Interpreter, rule: KeepRule, on_drop: OnDrop, worth: Worth | None = None, merging: Merging = PLAIN
    ) -> None:
        super().__init__()
        self.interpreter, self.rule, self.on_drop, self.worth = interpreter, rule, on_drop, worth
        self.merging = merging

    @property
    def wants_keys(self) -> bool:  # type: ignore[override]
        return self._compares and self.merging.similarity == "keys"

    @property
    def wants_tokens(self) -> bool:  # type: ignore[override]
        return self._compares and self.merging.similarity == "tokens"

    @property
    def wants_class(self) -> bool:  # type: ignore[override]
        return self.interpreter.config.context

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.on_drop != "discard"

    @property
    def _compares(self) -> bool:
        """Whether tokens are compared at all."""
        return self._matches or (self.worth is not None and self.worth.compares)

    @property
    def _matches(self) -> bool:
        """Whether dropped patches look for the most similar kept one."""
        return self.on_drop == "merge"

    def forward(
        self, tokens: PackedTokens, key_THK: Float[Tensor, "T _H K"] | None, class_TH: Float[Tensor, "T H"] | None = None
    ) -> Reduction:
        score_T = self.interpreter(tokens, class_TH)
        return self.apply_rule(self.rule, tokens, self.judge(score_T, tokens, key_THK))

    def judge(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, key_THK: Tensor | None) -> Judged:
        """What keep rules and hand-over need to know of scored tokens."""
        features_TF = tokens.x_TD if key_THK is None else key_THK.flatten(1)
        if self.worth is None:
            cosines = compare(features_TF, tokens.layout) if self._matches else None
            return Judged(score_T, score_T, cosines)
        relevance_T, exact = self.worth.relevance(score_T, tokens).detach(), bool(self.worth.config.pairs)
        cosines = compare(features_TF, tokens.layout, relevance_T, exact) if self._compares else None
        return Judged(score_T, self.worth(score_T, tokens, cosines), cosines)

    def apply_rule(self, rule: KeepRule, tokens: PackedTokens, judged: Judged) -> Reduction:
        """The reduction that `rule` makes of judged tokens (training applies several rules to the same)."""
        chosen = rule(judged.chance_T, tokens.layout)
        after = hand_over(tokens, chosen, self.on_drop, judged, self.merging)
        return Reduction(tokens.layout, judged.score_T, chosen, after, None if self.worth is None else judged.chance_T)

    def macs(self, entering: int, kept: int) -> int:
        del kept
        return self.interpreter.macs(entering) + (comparing_macs(entering, self.interpreter.width) if self._compares else 0)
