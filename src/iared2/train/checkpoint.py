"""Atomic checkpoints: written beside the old one, then renamed; the old one goes last."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from iared2.errors import TrainingError

SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """Where a run stands: finished stages, and finished steps of the stage after them."""

    stage: int = 0
    step: int = 0


def _folders(run: Path) -> list[Path]:
    found = [path for path in (run / "checkpoints").glob("stage*-step*") if (path / "place.json").is_file()]
    return sorted(found, key=lambda path: astuple(_read(path)[1]))


@contextmanager
def _whole(checkpoint: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one line that says how to go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise TrainingError(f"{checkpoint}: a damaged checkpoint ({reason}); delete this folder to start over") from None


def _read(checkpoint: Path) -> tuple[str, Place]:
    """Fingerprint and place of a checkpoint."""
    with _whole(checkpoint):
        record = json.loads((checkpoint / "place.json").read_text())
        place = Place(**record["place"])
        if not (isinstance(place.stage, int) and isinstance(place.step, int)):
            raise TypeError("place.json: stage and step must be numbers")
        return str(record["fingerprint"]), place


def refuse_another_recipe(run: Path, fingerprint: str) -> None:
    """Does nothing if the run folder holds no checkpoint, or one of this recipe.

    Raises:
        TrainingError: the last checkpoint was written by another recipe, or is damaged.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None:
        _place_in(checkpoint, fingerprint)


def _place_in(checkpoint: Path, fingerprint: str) -> Place:
    """The place of a checkpoint that must be this recipe's."""
    found, place = _read(checkpoint)
    if found != fingerprint:
        raise TrainingError(
            f"{checkpoint.parent.parent} holds a run of another recipe; give another output folder, or "
            "remove this one to start anew (another budget of a finished model: iared2 calibrate)"
        )
    return place


def latest_checkpoint(run: Path) -> Path | None:
    """The furthest complete checkpoint of a run folder, or None."""
    found = _folders(run)
    return found[-1] if found else None


def save_checkpoint(run: Path, model: nn.Module, optimizer: dict[str, Any] | None, place: Place, fingerprint: str) -> Path:
    """Writes one checkpoint and removes older ones, never leaving the run without a whole one.

    Args:
        optimizer: its state, as one process would have it.

    Raises:
        TrainingError: the disk is full or may not be written to; the checkpoint before this one stays.
    """
    try:
        return _save(run, model, optimizer, place, fingerprint)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save says RuntimeError when a disk is full
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise TrainingError(f"{run}: a checkpoint cannot be written ({reason}); free some space and give the command again") from None


def _save(run: Path, model: nn.Module, optimizer: dict[str, Any] | None, place: Place, fingerprint: str) -> Path:
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"stage{place.stage:02d}-step{place.step:08d}"
    partial = parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, partial / "model.safetensors")
    if optimizer is not None:
        torch.save(optimizer, partial / "optimizer.pt")
    (partial / "place.json").write_text(json.dumps({"schema": SCHEMA, "fingerprint": fingerprint, "place": asdict(place)}))
    _sync(partial)
    older = [path for path in parent.iterdir() if path not in (partial, target)]
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(parent)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    return target


def load_weights(checkpoint: Path, model: nn.Module, fingerprint: str) -> Place:
    """Puts a checkpoint's weights into `model` and says where the run stands.

    Raises:
        TrainingError: the checkpoint was written by another recipe, or is damaged.
    """
    place = _place_in(checkpoint, fingerprint)
    with _whole(checkpoint):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return place


def load_optimizer_state(
    checkpoint: Path,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    divide: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Puts a checkpoint's optimiser state into `optimizer`, through `divide` where a process holds a part of it.

    Raises:
        TrainingError: the state is missing or damaged.
    """
    with _whole(checkpoint):
        place = "cpu" if device.type == "cpu" else device  # Accelerate calls the CPU of one of several processes cpu:0, torch.load cpu
        state = torch.load(checkpoint / "optimizer.pt", map_location=place, weights_only=True)
        optimizer.load_state_dict(state if divide is None else divide(state))


def _sync(folder: Path) -> None:
    """Flushes the folder's files and its entries to the disk."""
    for path in [p for p in folder.iterdir() if p.is_file()] + [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
