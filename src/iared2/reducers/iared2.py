"""The paper's reducer: a multi-head interpreter, a keep rule, and a hand-over."""

from jaxtyping import Float
from torch import Tensor

from iared2.handover import OnDrop, hand_over, matching_macs
from iared2.interpreter import Interpreter
from iared2.keep import KeepRule
from iared2.reducers.base import Reducer, Reduction
from iared2.tokens.packed import PackedTokens


class InterpreterReducer(Reducer):
    """Scores patches with an interpreter (Eq. 1), keeps some, and hands over the rest.

    Attributes:
        interpreter: the scorer; all that is learned.
        rule: the keep rule; may be replaced at any time.
        on_drop: "discard" or "merge".
    """

    def __init__(self, interpreter: Interpreter, rule: KeepRule, on_drop: OnDrop) -> None:
        super().__init__()
        self.interpreter, self.rule, self.on_drop = interpreter, rule, on_drop

    @property
    def wants_keys(self) -> bool:  # type: ignore[override]
        return self.merges

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.on_drop == "merge"

    def forward(self, tokens: PackedTokens, key_THK: Float[Tensor, "T H K"] | None) -> Reduction:
        return self.apply_rule(self.rule, self.interpreter(tokens), tokens, key_THK)

    def apply_rule(self, rule: KeepRule, score_T: Float[Tensor, " T"], tokens: PackedTokens, key_THK: Tensor | None) -> Reduction:
        """The reduction that `rule` makes of given scores (training applies two rules to the same scores)."""
        chosen = rule(score_T, tokens.layout)
        features = None if key_THK is None else key_THK.flatten(1)
        return Reduction(tokens.layout, score_T, chosen, hand_over(tokens, chosen, self.on_drop, features))

    def macs(self, entering: int, kept: int) -> int:
        matching = matching_macs(entering - kept, kept, self.interpreter.width) if self.merges else 0
        return self.interpreter.macs(entering) + matching
