"""A teacher's logits for every training picture, computed once and kept beside the run."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iared2.data.arrays import ImageArrays, Preprocess, plain_batch
from iared2.errors import ConfigError
from iared2.saving import load_tensors, pretrained_backbone
from iared2.train.recipes import TeacherSettings

logger = logging.getLogger("iared2.train")


def with_teacher(arrays: ImageArrays, settings: TeacherSettings, cache: Path, device: torch.device) -> ImageArrays:
    """The same pictures with the teacher's logits as `targets`, restricted to the pictures' own classes."""
    key = json.dumps(settings.model_dump(include={"model", "image_size"}) | {"pictures": len(arrays)}, sort_keys=True)
    logits = _cached(cache, key)
    if logits is None:
        logits = _compute(arrays, settings, device)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logits": logits.half()}, cache, metadata={"key": key})
    return replace(arrays, targets=logits.float())


def _cached(cache: Path, key: str) -> Tensor | None:
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, "pt") as stream:
            return stream.get_tensor("logits") if (stream.metadata() or {}).get("key") == key else None
    except SafetensorError:  # half a file, from a run that was killed as it wrote: computed anew
        return None


def build_teacher(settings: TeacherSettings) -> Any:
    """The teacher at its own input size, in eval mode."""
    if settings.weights is None:
        return pretrained_backbone(settings.model, dynamic_img_size=True).eval()
    name = settings.model.split(".")[0]
    if not timm.is_model(name):
        raise ConfigError(f"dense.teacher.model: timm has no model {name!r}; name another, or train without (dense.teacher=null)")
    model = timm.create_model(name, dynamic_img_size=True)
    load_tensors(model, Path(settings.weights))
    return model.eval()


def class_columns(class_ids: list[str], classes: int) -> Tensor:
    """The teacher's output columns for our classes, matched by WordNet id."""
    names = timm.data.ImageNetInfo().label_names()
    if classes != len(names):
        raise ConfigError(f"teacher: got {classes} classes, wanted {len(names)} (ImageNet-1k), so that WordNet ids can be matched")
    unknown = [c for c in class_ids if c not in names]
    if unknown:
        raise ConfigError(f"teacher: class {unknown[0]!r} is not an ImageNet-1k WordNet id; train without a teacher (dense.teacher=null)")
    return torch.tensor([names.index(c) for c in class_ids])


@torch.inference_mode()
def _compute(arrays: ImageArrays, settings: TeacherSettings, device: torch.device) -> Tensor:
    model = build_teacher(settings).to(device)
    data = timm.data.resolve_model_data_config(model)
    size = (settings.image_size, settings.image_size)
    how = Preprocess(size, data["mean"], data["std"])
    columns = class_columns(list(arrays.class_ids), model.num_classes).to(device)
    found, start = [], time.perf_counter()
    for chunk in arrays.pixels.split(100):
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(plain_batch(chunk, how).to(device))
        found.append(logits.float()[:, columns].cpu())
        if len(found) % 50 == 0:
            done = 100 * len(found)
            logger.info("teacher %d/%d %.0f images/s", done, len(arrays), done / (time.perf_counter() - start))
    return torch.cat(found)
