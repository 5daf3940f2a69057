"""The pictures of a recipe as batches: training, and a held-out part to watch the run."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from iared2.data.arrays import ImageArrays, Preprocess, with_views
from iared2.data.batches import make_batches, to_arrays
from iared2.data.images import LabelledImages
from iared2.data.labels import check_labels, model_class_ids
from iared2.data.sources import Data, open_data
from iared2.errors import ConfigError
from iared2.seeds import generator
from iared2.train.recipes import DataSettings, Recipe
from iared2.train.trainer import Batches

logger = logging.getLogger("iared2.train")


@dataclass(frozen=True)
class Feeds:
    """Batches to train on, and batches to watch the run with (None if there are none)."""

    train: Batches
    held_out: Batches | None


def open_feeds(recipe: Recipe, backbone: Any, workers: int) -> Feeds:
    """Opens a recipe's data for a backbone, whose class ids and preprocessing it takes.

    Raises:
        ConfigError: no data was named, or more pictures are to be held out than there are.
        DataError: data that cannot be read or does not fit the backbone's classes.
    """
    settings = recipe.data
    if settings.train is None:
        raise ConfigError("data.train: no training data named; give --data FOLDER")
    how = Preprocess.of(backbone, min_scale=settings.min_scale, flip=settings.flip)
    classes = model_class_ids(backbone)
    found = open_data(settings.train, settings.train_split, classes, labels=settings.labels)
    names = list(found.names) if isinstance(found, LabelledImages) else None
    data = _in_memory(found, settings, how)
    if isinstance(data, ImageArrays) and data.class_ids and len(data.class_ids) == backbone.num_classes:
        backbone.class_ids = list(data.class_ids)  # so that the saved model knows what its outputs mean
    held_out, data = _hold_out(data, settings, classes, how, names)
    for part in (data, held_out):
        if settings.labels and isinstance(part, (ImageArrays, LabelledImages)):
            check_labels(part.labels, backbone.num_classes, settings.train)
    if settings.subset is not None and isinstance(data, (ImageArrays, LabelledImages)):
        data = data.subset(settings.subset, recipe.seed)
    if settings.views:
        if not isinstance(data, ImageArrays):
            raise ConfigError("data.views: needs pictures in memory; set data.in_memory=true")
        data = with_views(data, settings.views, settings.view_min_scale, recipe.seed)
    train = make_batches(data, how, settings.batch_size, recipe.seed, train=True, workers=workers)
    watch = (
        None if held_out is None else make_batches(held_out, how, min(100, settings.batch_size), recipe.seed, train=False, workers=workers)
    )
    return Feeds(train, watch)


def _in_memory(data: Data, settings: DataSettings, how: Preprocess) -> Data:
    return to_arrays(data, how.size) if settings.in_memory and isinstance(data, LabelledImages) else data


def _hold_out(
    data: Data, settings: DataSettings, classes: list[str] | None, how: Preprocess, names: list[str] | None
) -> tuple[Data | None, Data]:
    """The held-out part and what is left to train on; `names` are the training pictures' files, where they are files."""
    if settings.held_out:
        if not isinstance(data, (ImageArrays, LabelledImages)):
            raise ConfigError(f"data.held_out: {settings.train} is a stream, of which nothing can be held out; name data.val instead")
        count = min(settings.held_out, int(settings.held_out_share * len(data)))
        if count >= len(data):
            raise ConfigError(f"data.held_out: cannot take {settings.held_out} pictures away from {settings.train}; name data.val instead")
        if count < settings.held_out:
            few = "data.held_out: %d of %d pictures are held out instead of %d, which is more than data.held_out_share=%g of them"
            logger.info(few, count, len(data), settings.held_out, settings.held_out_share)
        order = torch.randperm(len(data), generator=generator(0)).tolist()
        return data.select(sorted(order[:count])) if count else None, data.select(sorted(order[count:]))
    source = settings.val or settings.train or ""
    if source == settings.train and settings.val_split == settings.train_split:
        return None, data
    found = open_data(source, settings.val_split, classes, labels=settings.labels)
    if isinstance(found, LabelledImages) and list(found.names) == names:
        logger.info("%s has no separate %s part: nothing is held out", source, settings.val_split)
        return None, data
    if settings.val_subset is not None and isinstance(found, (ImageArrays, LabelledImages)):
        found = found.subset(settings.val_subset, 0)
    return _in_memory(found, settings, how), data
