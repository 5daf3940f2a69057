"""Class names: what a model says its classes are called, or timm's list for the ImageNet label sets."""

from functools import cache

from torch import nn

IMAGENET_CLASSES = 1000


def class_names(model: nn.Module) -> list[str] | None:
    """One name per class of the model's head, or None where nobody knows them.

    A model's own `labels` come first; a head of 1000 classes without them is taken for ImageNet-1k.
    """
    count = getattr(model, "num_classes", 0)
    own = getattr(model, "labels", None)
    if own is not None:
        return list(own) if len(own) == count else None
    return list(_imagenet_names()) if count == IMAGENET_CLASSES else None


@cache
def _imagenet_names() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(IMAGENET_CLASSES))
