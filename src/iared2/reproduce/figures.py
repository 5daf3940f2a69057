"""Figures 3, 4, 6 and 7: photos chosen at random with their maps, or with what each group leaves, on one sheet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iared2.data.masks import MaskedImages
from iared2.data.pictures import find_pictures, read_picture
from iared2.errors import DataError
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.output import write
from iared2.report.files import png
from iared2.report.gallery import Preparation
from iared2.report.sheet import central, contact_sheet, heat_panels, kept_panels
from iared2.report.tables import lines
from iared2.reproduce.hierarchy import hierarchy_numbers
from iared2.reproduce.maps import NO_MEMNET, MapsBench, command, facts
from iared2.reproduce.runs import write_json
from iared2.reproduce.table1 import second_group
from iared2.runtime import precision
from iared2.seeds import generator


@dataclass(frozen=True)
class Sheet:
    """What a figure shows: how many photos by default, in how many columns, and whether maps or what groups keep."""

    source: str
    photos: int
    columns: int = 2
    kept: bool = False


SHEETS = {
    "figure3": Sheet("Figure 3: memorability, raw attention of the second block, and ours", 16),
    "figure6": Sheet("Figure 6 (appendix G): more maps as in Figure 3", 36, 3),
    "figure4": Sheet("Figure 4: what each group leaves", 8, kept=True),
    "figure7": Sheet("Figure 7 (appendix G): more photos as in Figure 4", 20, kept=True),
}


@dataclass(frozen=True)
class Shot:
    """One photo on a sheet, cut to its central square."""

    name: str
    image: Image.Image


def run_figure(name: str, bench: MapsBench) -> int:
    """Draws one sheet, OUT/NAME.png, and OUT/NAME.md and .json that say what is on it.

    With --data, Figures 4 and 7 also come with the numbers behind them.

    Returns:
        0; 1 where photos could not be read.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    sheet, data, models = SHEETS[name], bench.open_masks(), bench.open_models()
    shots, failed = choose(bench, data, bench.count or sheet.photos)
    model = models[0]
    numbers, more, wrong = hierarchy_numbers(name, bench, models, data) if sheet.kept else ({}, [], False)
    bench.open_output()
    draw = partial(_kept_rows, model) if sheet.kept else partial(_heat_rows, bench, model)
    rows, titles, said = [], list[str](), list[list[str]]()
    with precision(next(model.parameters()).device, bench.dtype):
        for start in range(0, len(shots), bench.batch_size):
            panels, titles, words = draw(shots[start : start + bench.batch_size])
            rows += panels
            said += words
    write(bench.output / f"{name}.png", png(contact_sheet(rows, titles, sheet.columns)))
    record = {
        **facts(name, bench, model),
        "source": sheet.source,
        "titles": titles,
        "photos": [shot.name for shot in shots],
        "failed": failed,
    }
    text = [f"# {sheet.source}", "", f"![{sheet.source}]({name}.png)", "", "    " + command(name, bench), "", *_about(bench, sheet)]
    head = ["photo", "file", *(titles[1:] if sheet.kept else [])]
    body = [[str(n), shot.name, *cells] for n, (shot, cells) in enumerate(zip(shots, said, strict=True), start=1)]
    text += ["", *_photo_table(head, body)]
    if numbers:
        record["numbers"] = numbers
        text += ["", *more]
    (bench.output / f"{name}.md").write_text("\n".join([*text, *(f"- left out: {why}" for why in failed)]) + "\n")
    write_json(bench.output / f"{name}.json", record)
    return int(wrong or bool(failed))


def _photo_table(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table whose second column is text as well."""
    heading, rule, *rows = lines(head, body)
    return [heading, rule.replace("---:", "---", 1), *rows]


def _about(bench: MapsBench, sheet: Sheet) -> list[str]:
    out = [f"Photos are chosen at random (seed {bench.seed}) and cut to their central square, which is what the model sees."]
    if sheet.kept:
        return [*out, "In the corner and in the table: patches with a token of their own / all patches, after each group, in percent."]
    out += ["Each map is stretched to its own least and greatest value; ours is the second group's score."]
    return out if bench.memnet is not None else [*out, NO_MEMNET]


# ---- photos ---------------------------------------------------------------------------------------------------


def choose(bench: MapsBench, data: dict[str, MaskedImages], count: int) -> tuple[list[Shot], list[str]]:
    """Photos drawn at random from --photos, or else from the pictures of --data; those that cannot be read are replaced.

    Returns:
        The photos, and why others were left out.

    Raises:
        DataError: there is no photo that can be read.
    """
    openers, failed = _photo_files(bench.photos) if bench.photos else (_pictures_of(data), [])
    shots: list[Shot] = []
    for place in torch.randperm(len(openers), generator=generator(bench.seed)).tolist():
        if len(shots) == count:
            break
        name, open_image = openers[place]
        try:
            shots.append(Shot(name, central(open_image())))
        except DataError as error:
            failed.append(str(error))
    if not shots:
        raise DataError("; ".join(failed) or "--photos: there are no photos")
    return shots, failed


Openers = list[tuple[str, Callable[[], Image.Image]]]


def _photo_files(photos: Sequence[str]) -> tuple[Openers, list[str]]:
    """Photos by name; of a folder with images/ and masks/ only the images."""
    folders = [
        Path(photo) / "images" if (Path(photo) / "masks").is_dir() and (Path(photo) / "images").is_dir() else photo for photo in photos
    ]
    paths, failures = find_pictures(folders)
    return [(path.name, partial(_read, path)) for path in paths], [failure.reason for failure in failures]


def _read(path: Path) -> Image.Image:
    return read_picture(path).image


def _pictures_of(data: dict[str, MaskedImages]) -> Openers:
    return [(name, partial(_image_of, pictures, row)) for pictures in data.values() for row, name in enumerate(pictures.names)]


def _image_of(pictures: MaskedImages, row: int) -> Image.Image:
    return pictures.open(row).image


def _inputs(model: ReducedTransformer, shots: Sequence[Shot]) -> Tensor:
    prepare, parameter = Preparation.of(model), next(model.parameters())
    return torch.stack([prepare(shot.image) for shot in shots]).to(parameter.device)


# ---- rows -----------------------------------------------------------------------------------------------------

Rows = tuple[list[list[Image.Image]], list[str], list[list[str]]]  # panels per photo, titles, what the table says beside each photo


def _heat_rows(bench: MapsBench, model: ReducedTransformer, shots: Sequence[Shot]) -> Rows:
    asked = {} if bench.memnet is None else {"memorability": f"memorability:{bench.memnet}"}
    block, group = min(1, model.adapter.depth - 1), second_group(model)
    asked |= {f"attention, block {block + 1}": f"attention:{block}", f"ours, group {int(group.partition(':')[2]) + 1}": group}
    images = _inputs(model, shots)
    maps = {title: find_explainer(name, model, bench.seed)(images).cpu().numpy() for title, name in asked.items()}
    panels = [heat_panels(shot.image, {title: found[row] for title, found in maps.items()}) for row, shot in enumerate(shots)]
    return panels, ["photo", *asked], [[] for _ in shots]


def _kept_rows(model: ReducedTransformer, shots: Sequence[Shot]) -> Rows:
    with torch.inference_mode():
        trace = model.trace(_inputs(model, shots))[1].cpu()
    kept_BGhw = trace.keep_GBN.transpose(0, 1).reshape(len(shots), trace.groups, *trace.grid).numpy()
    panels = [kept_panels(shot.image, list(kept)) for shot, kept in zip(shots, kept_BGhw, strict=True)]
    titles = [f"group {group + 1}" for group in range(trace.groups)]
    return panels, ["photo", *titles], [[f"{100 * np.mean(one):.0f} %" for one in kept] for kept in kept_BGhw]
