"""Lets `import timm` work where a CPU-only torch sits beside the ordinary torchvision wheel.

That torchvision cannot load its compiled operators, and while importing it registers fake kernels for `nms` and
`qnms`, which fails because nobody declared them. Declaring the two schemas first is enough: neither is ever
called here. `import iared2` only installs a hook that does so when torchvision is about to be imported, so that
`iared2 --help` does not wait for torch.
"""

import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # libraries: declarations vanish with them


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself; declares what torchvision lacks just before another finder finds it."""

    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def declare_missing_operators() -> bool:
    """Declares `torchvision::nms` and `::qnms` if torchvision's compiled operators cannot be loaded.

    Returns:
        Whether that was necessary.
    """
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    compiled = next((p for p in Path(spec.origin).parent.glob("_C*") if p.suffix in {".so", ".pyd", ".dylib"}), None)
    if compiled is not None:
        try:
            torch.ops.load_library(compiled)  # as torchvision itself will: loading twice is loading once
        except (OSError, RuntimeError):
            pass
        else:
            return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _kept.append(library)
    return True


def install() -> None:
    """Puts the hook in place, unless torchvision is there already or has been hooked."""
    hooked = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and not hooked:
        sys.meta_path.insert(0, _BeforeTorchvision())


install()
