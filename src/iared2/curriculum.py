"""Algorithm 1 (appendix A) as data: which stage trains what, in which order."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["warm_start", "interpreter", "blocks"]


@dataclass(frozen=True)
class StagePlan:
    """One stage: the interpreter of a group, or the blocks of that and all later groups. Groups count from 0."""

    kind: Kind
    group: int
    epochs: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.group + 1}"


def algorithm_1(groups: int, interpreter_epochs: int, block_epochs: int, warm_start_epochs: float = 0) -> tuple[StagePlan, ...]:
    """The paper's curriculum: for each group its interpreter, then the blocks from there on.

    Args:
        interpreter_epochs: 10 in the paper.
        block_epochs: 20 in the paper; 0 trains interpreters only.
        warm_start_epochs: epochs of imitation before each group's REINFORCE (not in the paper).
    """
    plans = []
    for group in range(groups):
        stages: list[tuple[Kind, float]] = [
            ("warm_start", warm_start_epochs),
            ("interpreter", interpreter_epochs),
            ("blocks", block_epochs),
        ]
        plans += [StagePlan(kind, group, epochs) for kind, epochs in stages if epochs]
    return tuple(plans)
