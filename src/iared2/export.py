"""ONNX export of reduced models whose shapes are static: the top-k rule, with a batch of any size."""

import importlib.util
import math
from pathlib import Path

import torch

from iared2.errors import ConfigError
from iared2.model import ReducedTransformer

_ONE_FILE = 1_900_000_000  # protobuf's limit is 2 GiB; larger weights go into a second file beside the first


def export_onnx(model: ReducedTransformer, path: str | Path, image_size: int | tuple[int, int] | None = None) -> Path:
    """Writes a model as ONNX, input `images` (batch, channels, height, width) and output `logits`; the batch is free.

    Args:
        model: a reduced model with `rule="top_k"`; other rules make the number of tokens depend on the picture.
        path: the file to write, usually `*.onnx`.
        image_size: height and width in pixels; None takes the backbone's own.

    Returns:
        The path written.

    Raises:
        ConfigError: another rule, a pooling that does not export, or the extra `onnx` is not installed.
    """
    _check(model)
    height, width = _size(model, image_size)
    weight = next(model.parameters())
    images = weight.new_zeros(2, model.backbone.patch_embed.proj.in_channels if _has_projection(model) else 3, height, width)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    training = model.training
    try:
        torch.onnx.export(
            model.eval(),
            (images,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )
    finally:
        model.train(training)
    return path


def _check(model: ReducedTransformer) -> None:
    config = model.config
    if config.rule != "top_k":
        ratios = ", ".join(f"{0.7 ** (group + 1):.2g}" for group in range(len(config.first_blocks)))
        raise ConfigError(
            f"export: got rule={config.rule!r}, wanted 'top_k', the rule with which token counts do not depend on the picture; "
            f"call model.configure(rule='top_k', ratios=({ratios},)) first, with the shares of patches to keep"
        )
    if config.second_look:
        raise ConfigError(
            f"export: got second_look={config.second_look:g}, but a graph cannot choose pictures for a second pass; "
            "call model.configure(second_look=0) first, and look again outside"
        )
    pool = getattr(model.backbone, "global_pool", "token")
    if config.on_drop != "discard" and pool not in ("token", "avg", ""):
        raise ConfigError(f"export: pooling {pool!r} does not export with on_drop={config.on_drop!r}; use on_drop='discard'")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export: {' and '.join(missing)} not installed; run pip install 'iared2[onnx]'")


def _has_projection(model: ReducedTransformer) -> bool:
    return hasattr(getattr(model.backbone.patch_embed, "proj", None), "in_channels")


def _size(model: ReducedTransformer, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        own = getattr(model.backbone.patch_embed, "img_size", None)
        image_size = tuple(own) if own is not None else tuple(model.pretrained_cfg["input_size"][-2:])
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if math.prod((height, width)) <= 0:
        raise ConfigError(f"export: got an image size of {height}x{width}, wanted positive numbers of pixels")
    return height, width
