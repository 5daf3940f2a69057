"""Budgets that a user can name, and schedules that meet them: how many patches go on after each reduction.

A schedule is one ratio per group, the share of the image's patches that is left. Schedules of one family are powers of
one curve, r_g^s: s = 0 keeps everything, and the multiply-adds fall steadily as s grows.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from iared2.errors import ConfigError

# Share of patches left at relative depth 0, 1/12, ..., 1 of a plain ViT, for about half of the multiply-adds: few go early, where
# scores know little and similarity decides; most go in the middle, where one patch costs much and says little that is its own.
CURVE = (1.0, 1.0, 1.0, 0.98, 0.77, 0.52, 0.39, 0.31, 0.25, 0.20, 0.16, 0.13, 0.10)
# The same where no kept patch stands for what is dropped. A patch that is gone is then missed by all blocks that follow alike: what can
# go at all goes at once, and the others stay long.
CURVE_OF_THE_GONE = (0.54, 0.53, 0.52, 0.51, 0.50, 0.49, 0.48, 0.44, 0.40, 0.35, 0.30, 0.27, 0.24)
# The same where patches are redundant in pairs alone (`worth`): crowds are thinned early, for which likeness is enough; what is no
# evidence goes as soon as that is known, and little goes afterwards.
CURVE_IN_PAIRS = (0.96, 0.88, 0.74, 0.57, 0.42, 0.39, 0.365, 0.34, 0.318, 0.29, 0.265, 0.24, 0.21)

LARGEST = 12.0  # power of a schedule; beyond it next to nothing is left

_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(x|%|g|gmacs|m|mmacs|ms)\s*", re.IGNORECASE)
_UNITS = {"x": ("share", 1.0), "%": ("share", 0.01), "g": ("macs", 1e9), "gmacs": ("macs", 1e9), "m": ("macs", 1e6), "mmacs": ("macs", 1e6)}
_WANTED = "wanted a share of the dense model's multiply-adds (0.65x or 65%), a number of them (0.8G, 800M), or a time per image (9ms)"


@dataclass(frozen=True)
class Budget:
    """What an image may cost on average: a share of the dense multiply-adds, multiply-adds, or milliseconds."""

    kind: Literal["share", "macs", "ms"]
    value: float

    def share(self, dense_macs: int) -> float:
        """The budget as a share of the dense model's multiply-adds.

        Raises:
            ConfigError: it is a time, or not below the dense model's cost.
        """
        if self.kind == "ms":
            raise ConfigError("budget: a time has to be measured; it is no share of multiply-adds")
        share = self.value if self.kind == "share" else self.value / dense_macs
        if not 0 < share < 1:
            raise ConfigError(
                f"budget: got {share:.2f} of the dense model's {dense_macs / 1e9:.3g} G multiply-adds, "
                "wanted less than 1; name a smaller one"
            )
        return share


def parse_budget(text: str) -> Budget:
    """A budget from words: "0.65x", "65%", "0.8G", "800M" or "9ms".

    Raises:
        ConfigError: something else, or nothing at all.
    """
    match = _FORM.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"budget: got {text!r}, {_WANTED}")
    unit = match[2].lower()
    if unit == "ms":
        return Budget("ms", float(match[1]))
    kind, factor = _UNITS[unit]
    return Budget("share" if kind == "share" else "macs", float(match[1]) * factor)


def curve(depth: int, blocks: Sequence[int], between: bool, merges: bool = True, thinned: bool = False) -> tuple[float, ...]:
    """The plain schedule at these blocks of a backbone of `depth` blocks, read off at each block's relative depth.

    Args:
        between: whether patches are dropped between the halves of the blocks.
        merges: whether dropped patches are merged into similar kept ones (`CURVE`), or gone, or in one summary (`CURVE_OF_THE_GONE`).
        thinned: whether those that are gone are redundant in pairs alone (`worth.thins`, `CURVE_IN_PAIRS`).
    """
    gone, ratios = CURVE_IN_PAIRS if thinned else CURVE_OF_THE_GONE, []
    known = CURVE if merges else gone
    for block in blocks:
        place = (block + 1 if between else block) * (len(known) - 1) / depth
        low = min(int(place), len(known) - 2)
        ratios.append(known[low] + (place - low) * (known[low + 1] - known[low]))
    return tuple(ratios)


def powered(ratios: Sequence[float], power: float) -> tuple[float, ...]:
    """The schedule r_g^s."""
    return tuple(ratio**power for ratio in ratios)


def solve_power(cost: Callable[[Sequence[float]], float], ratios: Sequence[float], share: float) -> float:
    """The power s at which the schedule r^s costs `share`; costs fall as s grows.

    Args:
        cost: ratios -> share of the dense multiply-adds.

    Raises:
        ConfigError: the schedule cannot get there.
    """
    least, most = cost(powered(ratios, LARGEST)), cost(powered(ratios, 0.0))
    if not least <= share <= most:
        raise ConfigError(
            f"budget: got {share:.2f}x, but reducing at these blocks costs between {least:.2f}x and {most:.2f}x of the dense model; "
            "name a budget in between, or reduce at other blocks"
        )
    low, high = 0.0, LARGEST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(powered(ratios, middle)) > share else (low, middle)
    return (low + high) / 2
