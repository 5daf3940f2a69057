"""Means and 95 % intervals: over seeds, and over pictures where one seed is all there is."""

import math
import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom (any table of it).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = 1.959964


def student(degrees: int) -> float:
    """Student's t, two-sided 95 %; beyond the table by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5), to three digits."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    terms = ((_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96, (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384)
    return _Z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def paired(ours: Sequence[str], theirs: Sequence[str]) -> tuple[float, float | None]:
    """Mean difference of two models' accuracy on the same pictures, in points, and half of its 95 % interval.

    Args:
        ours, theirs: for each seed one digit per picture, 1 where the answer is right. Several seeds are averaged per picture, so
            the interval is over pictures: it does not say how another training would come out.
    """
    differences = [
        100 * statistics.mean(int(a) - int(b) for a, b in zip(mine, others, strict=True))
        for mine, others in zip(zip(*ours, strict=True), zip(*_repeated(theirs, len(ours)), strict=True), strict=True)
    ]
    if len(differences) < 2:
        return statistics.mean(differences), None
    return statistics.mean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))


def _repeated(digits: Sequence[str], count: int) -> Sequence[str]:
    """The dense model needs no seeds: its one row stands beside each."""
    return [digits[0]] * count if len(digits) == 1 else digits
