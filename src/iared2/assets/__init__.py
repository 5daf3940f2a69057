"""Layer 4: embedded models, found by name. Each is a folder with config.json, weights, a card and golden tensors."""

from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = "iared2_mini_patch8_96"


def embedded() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def find(name: str) -> Path | None:
    """The folder of an embedded model, or None."""
    return HERE / name if name in embedded() else None
