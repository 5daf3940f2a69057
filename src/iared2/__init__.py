"""iared2: vision transformers that drop, per image, the patches that do not matter, and show which ones did."""

from iared2 import _compat as _compat  # first: makes timm importable beside a CPU-only torch
from iared2.errors import IARED2Error as IARED2Error
from iared2.interpreter import InterpreterConfig as InterpreterConfig
from iared2.model import ReducedTransformer as ReducedTransformer
from iared2.model import ReductionConfig as ReductionConfig
from iared2.model import reduce as reduce
from iared2.saving import load_reduced as load_reduced
from iared2.trace import Trace as Trace

__version__ = "0.1.0"
