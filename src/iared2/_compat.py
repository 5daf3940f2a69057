"""Lets `import timm` work where a CPU-only torch sits beside the ordinary torchvision wheel.

That torchvision cannot load its compiled operators, and while importing it registers fake kernels for
`nms` and `qnms`, which fails because nobody declared them. Declaring the two schemas first is enough:
neither is ever called here. Imported by `iared2/__init__.py` before anything that imports timm.
"""

import importlib.util
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declared(name: str) -> bool:
    try:
        getattr(torch.ops.torchvision, name)
    except (AttributeError, RuntimeError):
        return False
    return True


def declare_missing_torchvision_ops() -> torch.library.Library | None:
    """Declares `torchvision::nms` and `::qnms` when torchvision cannot do so itself.

    Returns:
        The library object that holds the declarations (they vanish with it), or None if none were needed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported modules would shadow the second, successful import
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not _declared(name):
            library.define(name + _SCHEMA)
    return library


_LIBRARY = declare_missing_torchvision_ops()
