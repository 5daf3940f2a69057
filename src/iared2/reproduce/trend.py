"""Whether figures follow the paper's: sentences made of the numbers, so that nobody has to be believed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

Numbers = Mapping[str, Mapping[str, float]]  # by row, then by figure


@dataclass(frozen=True)
class Trend:
    """How rows stand to one another here and in the paper.

    Attributes:
        ranks: of the claimed row among the paper's rows, by figure: its place here, and of how many.
        same, pairs: by figure, how many pairs of the paper's rows stand in the same order here, of how many.
    """

    ranks: dict[str, tuple[int, int]]
    same: dict[str, int]
    pairs: int

    @property
    def holds(self) -> bool | None:
        """Whether the claimed row is first in every figure; None where there is nothing to compare it with."""
        if all(count == 1 for _, count in self.ranks.values()):
            return None
        return all(place == 1 for place, _ in self.ranks.values())

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"holds": self.holds, "ranks": {k: list(v) for k, v in self.ranks.items()}, "same_order": self.same, "pairs": self.pairs}


def trend(paper: Numbers, here: Numbers, claimed: str, instead: str | None = None) -> Trend:
    """Compares the paper's rows that have figures here.

    Args:
        paper, here: figures by row; only rows in both are compared.
        claimed: the row that the paper puts first.
        instead: the row of `here` that stands for it; the claimed one itself by default.
    """
    own = instead or claimed
    rows = [name for name in paper if name != claimed and name in here]
    value = {name: here[own if name == claimed else name] for name in [claimed, *rows]}
    names = list(paper[claimed])
    ranks = {one: (1 + sum(value[row][one] >= value[claimed][one] for row in rows), 1 + len(rows)) for one in names}
    pairs = list(combinations([claimed, *rows], 2))
    same = {one: sum((paper[a][one] - paper[b][one]) * (value[a][one] - value[b][one]) > 0 for a, b in pairs) for one in names}
    return Trend(ranks, same, len(pairs))


def places(found: Trend, headings: Mapping[str, str]) -> str:
    """The places in words: 'pixel acc. 2 of 5, mIoU 1 of 5'."""
    return ", ".join(f"{headings[name]} {place} of {count}" for name, (place, count) in found.ranks.items())


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
