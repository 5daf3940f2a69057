"""Puts a trained model into the package: fp16 weights, golden tensors, metrics and a card.

    python tools/embed_model.py RUN/model --name iared2_mini_patch8_96 --eval EVAL.json --card CARD.md

The card is a template in which {metrics}, {recipe}, {sha256} and {size} are filled in.
"""

import argparse
import json
import shutil
from pathlib import Path

import iared2  # first: see iared2/_compat.py

# isort: split
import timm

from iared2 import assets
from iared2.golden import check_golden, write_golden
from iared2.saving import load_reduced, save_reduced, sha256


def metrics_table(report: dict) -> str:
    """The rows of an `iared2 eval` report as markdown."""
    lines = ["| model | top-1 | top-5 | MACs | kept after each group |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        kept = ", ".join(f"{value:.2f}" for value in row["keep_ratio"])
        lines.append(f"| {row['name']} | {row['top1']:.2f} % | {row['top5']:.2f} % | {row['macs'] / 1e6:.1f} M | {kept} |")
    return "\n".join(lines)


def headed(report: dict, several: bool) -> str:
    """A report's table, with a line that tells it from others where there are several."""
    head = f"`{Path(report['data']).name}`, on_drop={report['settings']['on_drop']}:\n\n" if several else ""
    return head + metrics_table(report)


def without_folders(recipe: Path) -> str:
    """A run's recipe as JSON, with file names in place of the paths of the machine it ran on."""

    def shorten(value: object) -> object:
        if isinstance(value, dict):
            return {key: shorten(inner) for key, inner in value.items()}
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    return json.dumps(shorten(json.loads(recipe.read_text())), indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--weights", type=Path, help="backbone weights, where the folder holds none")
    parser.add_argument("--eval", type=Path, action="append", default=[], help="JSON files of `iared2 eval`, the main one first")
    parser.add_argument("--card", type=Path, help="the card's template; without it the folder's card stays as it is")
    parser.add_argument("--recipe", type=Path, help="recipe.json of the run")
    parser.add_argument("--labels", type=Path, help="labels.json: class names in label order")
    options = parser.parse_args()
    folder = assets.HERE / options.name
    model = load_reduced(str(options.model), weights=options.weights)
    save_reduced(model, folder, with_backbone=(options.model / "backbone.safetensors").is_file(), half=True)
    if options.labels is not None:
        shutil.copy(options.labels, folder / "labels.json")
    model = load_reduced(str(folder), weights=options.weights)
    size = tuple(timm.data.resolve_model_data_config(model.backbone)["input_size"][-2:])
    write_golden(model, folder, size)
    check_golden(model, folder)
    reports = [json.loads(path.read_text()) for path in options.eval]
    if reports:
        config = json.loads((folder / "config.json").read_text())
        dense, reduced = reports[0]["rows"][:2]
        config["metrics"] = {
            "top1": reduced["top1"],
            "dense_top1": dense["top1"],
            "macs": reduced["macs"],
            "dense_macs": dense["macs"],
            "keep_ratio": reduced["keep_ratio"],
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if options.card is not None:
        hashes = "\n".join(f"| {path.name} | {path.stat().st_size} | `{sha256(path)}` |" for path in sorted(folder.glob("*.safetensors")))
        text = options.card.read_text()
        values = {
            "metrics": "\n\n".join(headed(report, len(reports) > 1) for report in reports),
            "recipe": without_folders(options.recipe) if options.recipe is not None else "",
            "sha256": hashes,
            "version": iared2.__version__,
        }
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        (folder / "README.md").write_text(text)
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {total / 1e6:.2f} MB in {len(list(folder.iterdir()))} files, golden tensors agree")


if __name__ == "__main__":
    main()
