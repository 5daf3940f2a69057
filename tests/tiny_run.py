"""A complete small curriculum as a script: `python tiny_run.py FOLDER [steps per checkpoint]`. Tests run, kill and resume it."""

import sys
from pathlib import Path

import iared2  # noqa: F401 - first: see iared2/_compat.py

# isort: split
import timm
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer

from iared2.curriculum import algorithm_1
from iared2.data.arrays import ArrayBatches, ImageArrays, Preprocess
from iared2.model import ReducedTransformer, reduce
from iared2.train.feeds import Feeds
from iared2.train.recipes import BackboneSettings, DataSettings, Recipe, ReductionSettings
from iared2.train.run import build_stage
from iared2.train.trainer import RunSettings, Stage, Trainer


def tiny_backbone(seed: int = 0, **arguments) -> VisionTransformer:
    """A random ViT of 4 blocks on 16x16 pixels with stochastic depth, which makes resuming harder."""
    torch.manual_seed(seed)
    settings = dict(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=4, drop_path_rate=0.2)
    return VisionTransformer(**{**settings, **arguments})


def tiny_arrays(count: int = 48, seed: int = 0) -> ImageArrays:
    """Pictures whose class is the quarter that is bright: learnable by position."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 90, (count, 16, 16, 3), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=draw)
    for row, label in enumerate(labels.tolist()):
        top, left = 8 * (label // 2), 8 * (label % 2)
        pixels[row, top : top + 8, left : left + 8] += 150
    return ImageArrays(pixels, labels, [str(i) for i in range(count)], list("abcd"))


def tiny_feeds(batch_size: int = 8) -> Feeds:
    how = Preprocess((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Feeds(ArrayBatches(tiny_arrays(), how, batch_size), ArrayBatches(tiny_arrays(16, 1), how, 8, train=False))


def tiny_recipe(**reduction) -> Recipe:
    settings = dict(
        groups=2,
        interpreter_epochs=2,
        block_epochs=1,
        warm_start_epochs=1,
        warm_start_ratios=(0.8, 0.5),
        interpreter_optim={"lr": 1e-2, "lr_batch": 8},
        block_optim={"lr": 1e-3, "lr_batch": 8},
    )
    return Recipe(
        name="tiny",
        backbone=BackboneSettings(model="none"),
        data=DataSettings(flip=False, min_scale=1),
        reduction=ReductionSettings(**{**settings, **reduction}),
    )


def tiny_stages(model: ReducedTransformer, recipe: Recipe, accelerator: Accelerator) -> list[Stage]:
    assert recipe.reduction is not None
    chosen = recipe.reduction
    plans = algorithm_1(len(model.reducers), chosen.interpreter_epochs, chosen.block_epochs, chosen.warm_start_epochs)
    return [build_stage(plan, model, chosen, tiny_feeds(), accelerator) for plan in plans]


def main(folder: Path, checkpoint_every: int) -> None:
    torch.set_num_threads(1)
    accelerator, recipe = Accelerator(cpu=True), tiny_recipe()
    model = reduce(tiny_backbone(), 2, on_drop="merge")
    settings = RunSettings(folder, "tiny", seed=3, checkpoint_every=checkpoint_every, log_every=1)
    Trainer(model, settings, accelerator).fit(tiny_stages(model, recipe, accelerator))


if __name__ == "__main__":
    assert timm.__version__
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
