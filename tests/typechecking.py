"""The run-time type checker that pytest applies to every annotated function of the package (see pyproject.toml).

As in PEP 484, an int is welcome where a float is asked for. A function that is annotated with a protocol that
is not `runtime_checkable` goes unchecked.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its arguments and result checked against its annotations."""
    try:
        return _check(function)
    except BeartypeDecorHintPep3119Exception:
        return function
