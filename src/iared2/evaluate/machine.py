"""What a figure was measured with: device, precision, versions, the machine in words."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from iared2.errors import ConfigError

DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
PACKAGES = ("iared2", "torch", "timm", "torchmetrics", "pillow")


def pick_device(name: str) -> torch.device:
    """"auto" is the GPU if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: got {name!r}, which cannot be used here ({str(error).splitlines()[0]}); use auto or cpu") from None
    return device


def pick_dtype(name: str) -> torch.dtype:
    """"auto" is float32.

    Raises:
        ConfigError: not a precision this library knows.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {name!r}, wanted one of {', '.join(DTYPES)}")
    return DTYPES[name]


def synchronise(device: torch.device) -> None:
    """Waits for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str]:
    """The packages a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, and the accelerator if one is used."""
    summary: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        summary["accelerator"] = torch.cuda.get_device_name(device)
    return summary


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
