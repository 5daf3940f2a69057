"""The report of `iared2 eval`: typed rows, a Markdown table, a JSON file written in one move."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from iared2.errors import ConfigError
from iared2.settings import Settings

SCHEMA = 1


class Row(Settings):
    """One model's figures. Percentages from 0 to 100; MACs are means per image.

    Attributes:
        agreement: images on which the model's first class is the dense model's, in percent.
        kl: mean Kullback-Leibler divergence, dense || this model, in nats.
        macs_share: of the dense backbone's multiply-adds, from 0 to 1.
        macs_linear: multiply-adds without the two N^2 products of attention, as the paper's table counts DeiT-B.
        keep_ratio: kept patches / all patches, one per group.
        images_per_second: forward passes alone, without reading and preparing pictures.
        looked_again: images that were passed a second time, in percent.
    """

    name: str
    top1: float
    top5: float
    agreement: float
    kl: float
    macs: int
    macs_share: float
    macs_linear: int
    keep_ratio: tuple[float, ...]
    images_per_second: float
    looked_again: float = 0.0


class SourceRow(Settings):
    """The comparison on the pictures of one source, or on all (`source` is "all")."""

    source: str
    images: int
    dense_top1: float
    reduced_top1: float
    dense_top5: float
    reduced_top5: float
    agreement: float
    difference: float
    standard_error: float


class EvalReport(Settings):
    """Both models on the same pictures in one run: rows "dense" and "reduced", and the paired comparison."""

    images: int
    rows: tuple[Row, Row]
    comparison: SourceRow
    sources: tuple[SourceRow, ...] = ()

    @property
    def dense(self) -> Row:
        return self.rows[0]

    @property
    def reduced(self) -> Row:
        return self.rows[1]

    def markdown(self) -> str:
        """Tables for the screen and for a README."""
        groups = range(1, len(self.reduced.keep_ratio) + 1)
        head = ["model", "top-1 %", "top-5 %", "agreement %", "KL", "MACs (G)", "of dense", "linear MACs (G)"]
        head += [*(f"kept {group}" for group in groups), "images/s"]
        body = [
            [
                row.name,
                *(f"{value:.2f}" for value in (row.top1, row.top5, row.agreement)),
                f"{row.kl:.4f}",
                f"{row.macs / 1e9:.3f}",
                f"{row.macs_share:.1%}",
                f"{row.macs_linear / 1e9:.3f}",
                *(f"{ratio:.3f}" for ratio in row.keep_ratio),
                f"{row.images_per_second:.1f}",
            ]
            for row in self.rows
        ]
        text = [*_table(head, body), "", self._sentence()]
        if self.sources:
            head = ["source", "images", "dense top-1 %", "reduced top-1 %", "difference", "agreement %"]
            body = [
                [
                    row.source,
                    str(row.images),
                    f"{row.dense_top1:.2f}",
                    f"{row.reduced_top1:.2f}",
                    f"{row.difference:+.2f} ± {row.standard_error:.2f}",
                    f"{row.agreement:.2f}",
                ]
                for row in self.sources
            ]
            text += ["", *_table(head, body)]
        return "\n".join(text)

    def _sentence(self) -> str:
        pair, speed = self.comparison, self.reduced.images_per_second / self.dense.images_per_second
        again = self.reduced.looked_again
        twice = f"; {again:.1f} % of the images were looked at again" if again else ""
        return (
            f"{self.images} images. Top-1 of reduced minus dense: {pair.difference:+.2f} ± {pair.standard_error:.2f} points "
            f"(paired standard error); speed {speed:.2f} times dense, forward passes only{twice}."
        )


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def check_writable(path: Path) -> None:
    """Fails before the work starts rather than after it; makes the folder if there is none.

    Raises:
        ConfigError: the file cannot be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); give another file") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file next to its place and moves it there, so that nobody finds half of one.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); give another file") from None
