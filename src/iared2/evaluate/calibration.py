"""`iared2 calibrate`: thresholds for a budget or an allowed disagreement, on a folder of pictures, into a new model folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from iared2.budget import parse_budget
from iared2.data.batches import make_batches
from iared2.data.labels import model_class_ids
from iared2.data.sources import open_data
from iared2.data.streams import StreamedImages
from iared2.errors import ConfigError, DataError
from iared2.evaluate.calibrate import Calibrator
from iared2.evaluate.classify import eval_preprocess
from iared2.output import open_folder
from iared2.runtime import pick_device, precision
from iared2.saving import load_reduced, save_reduced


@dataclass(frozen=True)
class Wish:
    """What thresholds are wanted for: a budget, or the percentage of pictures that may get another class. Exactly one of them.

    With either, the share of pictures that may be looked at again.
    """

    budget: str | None = None
    disagreement: float | None = None
    second_look: float = 0.0

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.disagreement is None):
            raise ConfigError("calibrate: wanted one of --target-macs 0.65x and --disagreement 1.5; give one of the two")
        if self.disagreement is not None and not 0 <= self.disagreement < 100:
            raise ConfigError(f"--disagreement: got {self.disagreement:g}, wanted a percentage from 0 to 100")
        if not 0 <= self.second_look < 1:
            raise ConfigError(f"--second-look: got {self.second_look:g}, wanted a share of the pictures, from 0 to below 1, as 0.1")


@dataclass(frozen=True)
class CalibrationOptions:
    """On what, and how, calibration runs."""

    weights: Path | None = None
    limit: int = 256
    batch_size: int = 32
    workers: int = 0
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0


def run_calibration(model: str, data: Path, output: Path, wish: Wish, options: CalibrationOptions) -> int:
    """Chooses thresholds, says what to expect of them, and saves the model with them into `output`.

    Returns:
        0; 1 where broken pictures were left out.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    if options.limit < 1:
        raise ConfigError(f"--limit: got {options.limit}, wanted 1 or more")
    budget = None if wish.budget is None else parse_budget(wish.budget)
    place = pick_device(options.device)
    reduced = load_reduced(model, weights=options.weights, device=place)
    pictures = open_data(data, "val", model_class_ids(reduced.backbone), labels=False)
    if isinstance(pictures, StreamedImages):
        raise DataError(f"{data}: a stream cannot be sampled; give a folder or an archive of pictures")
    open_folder(output)  # after what may be wrong with the data, so that a refused run leaves nothing
    pictures = pictures.subset(options.limit, options.seed)
    batches = make_batches(pictures, eval_preprocess(reduced), options.batch_size, options.seed, train=False, workers=options.workers)
    with precision(place, options.dtype), torch.no_grad():
        calibrator = Calibrator(reduced, [batch["images"].to(place) for batch in batches.epoch(0)], second_look=wish.second_look)
        expected = calibrator.settled(
            lambda: calibrator.meet(budget) if budget is not None else calibrator.to_disagreement(wish.disagreement or 0.0)
        )
    save_reduced(reduced, output)
    calibrator.warn_of_few()
    Console().print(
        f"{expected.line()}, in {options.dtype}\nthe model with these thresholds is in {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return int(bool(getattr(batches, "skipped", None)))  # arrays of pixels have nothing to skip
