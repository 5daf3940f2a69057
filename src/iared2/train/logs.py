"""Progress on the screen, CSV and TensorBoard files on disk: one log per stage."""

import csv
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

logger = logging.getLogger("iared2.train")


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of an earlier run of this stage that the checkpoint at `step` still knows."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if int(row["step"]) <= step]


class CsvFile:
    """A CSV that keeps the rows up to a resumed step and takes its columns from the first row written."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = _rows_until(path, resume_step)
        self._stream = path.open("w", newline="")
        self._writer: csv.DictWriter | None = None
        for row in kept:
            self.write(row)

    def write(self, row: dict) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._stream, list(row), extrasaction="ignore")
            self._writer.writeheader()
        self._writer.writerow(row)
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class StageLog:
    """Averages what a task reports between two log rows and writes them; silent on all but the main process."""

    def __init__(self, run: Path, stage: str, start: int, total: int, main: bool) -> None:
        self.stage, self.start, self.total, self.main = stage, start, total, main
        self._sums: dict[str, Tensor] = {}
        self._count = self._images = 0
        self._since = time.perf_counter()
        if not main:
            return
        folder = run / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._train = CsvFile(folder / f"{stage}.csv", start)
        self._val = CsvFile(folder / f"{stage}.val.csv", start)
        self._board = _tensorboard(folder / "tensorboard", start)
        console = Console(stderr=True)
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._progress.add_task(stage, total=total, completed=start, rate=0.0)

    def __enter__(self) -> "StageLog":  # noqa: PYI034 - the shape checks take methods one by one
        if self.main:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.main:
            self._progress.stop()
            self._train.close()
            self._val.close()
            if self._board is not None:
                self._board.close()

    def step(self, step: int, images: int, epoch: int, rate: float, logs: dict[str, Tensor], every: int) -> None:
        """Takes one step's scalars; writes a row every `every` steps and at the end."""
        if not self.main:
            return
        for name, value in logs.items():
            scalar = value.detach().float()
            self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar
        self._count += 1
        self._images += images
        if step % every and step != self.total:
            self._progress.update(self._bar, completed=step)
            return
        speed = self._images / max(1e-9, time.perf_counter() - self._since)
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._train.write({"step": step, "epoch": epoch, "lr": rate, "images_per_second": round(speed, 1), **means})
        self._scalars(step, means)
        self._progress.update(self._bar, completed=step, rate=speed)
        if self._progress.disable:
            left = (self.total - step) * images / max(1e-9, speed)
            text = " ".join(f"{name} {value:.4g}" for name, value in means.items())
            logger.info("%s %d/%d epoch %d %.0f images/s %.0f s left %s", self.stage, step, self.total, epoch, speed, left, text)
        self._sums, self._count, self._images, self._since = {}, 0, 0, time.perf_counter()

    def evaluation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Writes one row of held-out figures."""
        self._val.write({"step": step, "epoch": epoch, **values})
        self._scalars(step, {f"val_{name}": value for name, value in values.items()})
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("%s epoch %d held-out %s", self.stage, epoch, text)
        self._images, self._since = 0, time.perf_counter()  # the next rate leaves the evaluation out

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{self.stage}/{name}", value, step)


def _tensorboard(folder: Path, start: int) -> Any:  # the type lives in an optional extra
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed: the CSV files hold the logs (pip install 'iared2[train]' for both)")
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
