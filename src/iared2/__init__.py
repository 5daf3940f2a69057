"""iared2: vision transformers that drop, per image, the patches that do not matter, and show which ones did."""

from importlib import import_module
from typing import TYPE_CHECKING

from iared2 import _compat as _compat  # first: makes timm importable beside a CPU-only torch
from iared2.errors import IARED2Error as IARED2Error

if TYPE_CHECKING:
    from iared2.interpreter import InterpreterConfig as InterpreterConfig
    from iared2.model import ReducedTransformer as ReducedTransformer
    from iared2.model import reduce as reduce
    from iared2.reduction import ReductionConfig as ReductionConfig
    from iared2.saving import load_reduced as load_reduced
    from iared2.trace import Trace as Trace

__version__ = "0.1.0"

# Public names are imported when they are first asked for: torch and timm take seconds, `iared2 --help` should not.
_HOME = {
    "InterpreterConfig": "interpreter",
    "ReducedTransformer": "model",
    "ReductionConfig": "reduction",
    "reduce": "model",
    "load_reduced": "saving",
    "Trace": "trace",
}
__all__ = ["IARED2Error", "InterpreterConfig", "ReducedTransformer", "ReductionConfig", "Trace", "load_reduced", "reduce"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'iared2' has no attribute {name!r}")
    value = getattr(import_module(f"iared2.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
