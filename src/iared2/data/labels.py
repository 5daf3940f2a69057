"""Class names of data matched to the classes of a model."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from iared2.data.arrays import ImageArrays
from iared2.errors import DataError

logger = logging.getLogger("iared2.data")

_WORDNET_ID = re.compile(r"n\d{8}")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether all names look like n01440764 (and there is at least one)."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def model_class_ids(model: nn.Module) -> list[str] | None:
    """The ids of a model's classes in label order, or None where nobody knows them.

    A model's own `class_ids` or its configuration's `label_names` come first; a head of 1000, 11821, 21841,
    ... classes without them is taken for the ImageNet subset of that size, as timm does.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = getattr(model, "num_classes", 0)
    own = getattr(model, "class_ids", None) or (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own is not None and len(own) == count:
        return list(own)
    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else list(ImageNetInfo(subset).label_names())


def match_classes(found: Sequence[str], wanted: Sequence[str] | None, where: str) -> list[int]:
    """The label of each class of the data: by id where the model's ids are known, else its place in sorted order.

    Args:
        found: the data's class names, in their own (sorted) order.
        wanted: the model's class ids in label order, None if unknown.
        where: the data's name, for messages.

    Raises:
        DataError: some of the names are WordNet ids of the model and others are not.
    """
    place = {name: index for index, name in enumerate(wanted or ())}
    strangers = [name for name in found if name not in place]
    if not strangers:
        return [place[name] for name in found]
    if len(strangers) < len(found) and (are_wordnet_ids(found) or are_wordnet_ids(list(place))):
        raise DataError(
            f"{where}: class {strangers[0]!r}{_and_more(len(strangers) - 1)} not among the model's {len(place)} classes, "
            f"but {len(found) - len(strangers)} others are; remove those folders, or use a model of these classes"
        )
    if are_wordnet_ids(found):
        known = "are not these" if place else "are not known by name"
        logger.info("%s: WordNet ids, but the model's classes %s: labels 0 to %d in sorted order", where, known, len(found) - 1)
    return list(range(len(found)))


def relabel(arrays: ImageArrays, wanted: Sequence[str] | None, where: str) -> ImageArrays:
    """Pictures in memory with the model's labels; the data's own order where its classes are unknown or others."""
    if wanted is None or list(wanted) == list(arrays.class_ids):
        return arrays
    mapping = match_classes(arrays.class_ids, wanted, where)
    if mapping == list(range(len(mapping))):
        return arrays
    return replace(arrays, labels=torch.tensor(mapping)[arrays.labels], class_ids=list(wanted))


def check_labels(labels: Int[Tensor, " n"], classes: int, where: str) -> None:
    """Refuses labels that the model's head does not have.

    Raises:
        DataError: a label outside 0 .. classes - 1.
    """
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(outside):
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        fitting = f", or a model of {int(labels.max()) + 1} classes or more" if labels.max() >= classes and labels.min() >= 0 else ""
        raise DataError(
            f"{where}: label {int(labels[outside[0]])}{more} is outside the model's {classes} classes, "
            f"0 to {classes - 1}; use data labelled for this model{fitting}"
        )


def _and_more(count: int) -> str:
    return f" and {count} more are" if count else " is"
