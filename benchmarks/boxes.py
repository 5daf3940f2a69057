"""Do the maps of the second group find the object? Shares of maps inside ground-truth boxes.

python benchmarks/boxes.py TINY_IMAGENET_FOLDER [--model NAME] [--group 1]
"""

import argparse
from pathlib import Path

import iared2  # first: see iared2/_compat.py

# isort: split
import timm

from iared2 import assets
from iared2.data.arrays import Preprocess
from iared2.data.tiny_imagenet import load_tiny_imagenet
from iared2.evaluate.boxes import score_boxes
from iared2.tokens.grid import SIGMA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=assets.DEFAULT)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--group", type=int, default=1, help="counted from 0; the paper shows the second")
    options = parser.parse_args()
    model = iared2.ReducedTransformer.from_pretrained(options.model, weights=options.weights)
    how = Preprocess.from_timm(timm.data.resolve_model_data_config(model))
    report = score_boxes(model, load_tiny_imagenet(options.data, "val"), how, options.group)
    print(f"{options.model}, group {options.group + 1}, {report.pictures} pictures; share of the map inside the box:")
    for name, share in report.share.items():
        print(f"  {name}: {share:.2f} %")
    for name, (mean, half) in report.ahead.items():
        sigma = f" (deviation {SIGMA} of the side)" if name == "gaussian" else ""
        print(f"  ahead of {name}{sigma}: {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}")


if __name__ == "__main__":
    main()
