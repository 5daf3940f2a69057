"""Reduced models on disk: a versioned config.json, and safetensors with what reduction added.

| file | content |
|---|---|
| config.json | schema version, the backbone's recipe for timm, the reduction's settings, preprocessing; see `model_file` |
| reducers.safetensors | interpreters |
| backbone.safetensors | the backbone, only where it was trained after reduction or cannot be had otherwise |
| labels.json | class names in the order of the logits, where the model knows them |
| README.md | a short card, where there is none yet |
"""

import hashlib
import inspect
import json
import logging
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import nn

from iared2 import assets
from iared2.errors import ConfigError, HubError, IARED2Error, UnsupportedBackboneError, WeightsError
from iared2.features import names_classes
from iared2.model import ReducedTransformer
from iared2.model_file import BACKBONE, SCHEMA, Backbone, Data, read_config, read_labels, require_buildable, write_card
from iared2.runtime import pick_device
from iared2.settings import unknown_key

logger = logging.getLogger("iared2")

REDUCERS = "reducers.safetensors"
FILES = ["config.json", "labels.json", "*.safetensors", "README.md"]


def backbone_spec(backbone: Any) -> dict[str, Any]:
    """What `timm.create_model` needs to build this backbone again, without weights, and the arguments that JSON cannot hold."""
    known = getattr(backbone, "pretrained_cfg", None) or {}
    given = {key: value for key, value in getattr(backbone, "_model_args", {}).items() if key != "patch_drop_rate"}
    arguments = {key: value for key, value in given.items() if _plain(value)} | _present_arguments(backbone)
    return {
        "architecture": known.get("architecture"),
        "tag": known.get("tag") or None,
        "arguments": arguments,
        "dropped": sorted(set(given) - set(arguments)),
    }


def _present_arguments(backbone: Any) -> dict[str, Any]:
    """Arguments that may have changed since the backbone was built, as far as it has them."""
    embed: Any = getattr(backbone, "patch_embed", None)
    seen: dict[str, Any] = {}
    if hasattr(backbone, "num_classes"):
        seen["num_classes"] = int(backbone.num_classes)
    if getattr(embed, "img_size", None) is not None:
        seen["img_size"] = list(embed.img_size)
    if type(embed) is PatchEmbed:
        seen["patch_size"] = list(embed.patch_size)
    if getattr(backbone, "dynamic_img_size", False):
        seen["dynamic_img_size"] = True
    if hasattr(backbone, "global_pool"):
        seen["global_pool"] = backbone.global_pool
    return seen


def _plain(value: Any) -> bool:
    """Whether a value survives JSON."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def save_reduced(model: ReducedTransformer, folder: Path, with_backbone: bool | None = None, half: bool = False) -> None:
    """Writes a reduced model into a folder, in place of the model that was in it.

    Args:
        with_backbone: whether to write the backbone's weights; None writes them if they were trained since reduction, or
            came from a model folder, so that nobody else has them.
        half: store fp16 (loading gives fp32 back).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if with_backbone is None:
        with_backbone = model.backbone_trained or any(path.name == BACKBONE for path in model.files)
    data = timm.data.resolve_model_data_config(model.backbone)
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "library": "iared2",
        "backbone": backbone_spec(model.backbone) | {"included": with_backbone},
        "reduction": model.config.model_dump(mode="json"),
        "data": {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        "class_ids": _one_per_class(getattr(model.backbone, "class_ids", None), model, "class_ids"),
    }
    labels = _one_per_class(model.labels, model, "labels")
    _clear(folder, [*([] if with_backbone else [BACKBONE]), *([] if labels else ["labels.json"])])
    _write_tensors(folder / REDUCERS, model.reducers, half)
    if with_backbone:
        _write_tensors(folder / BACKBONE, model.backbone, half)
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_card(folder, config)


def _one_per_class(values: list[str] | None, model: ReducedTransformer, name: str) -> list[str] | None:
    """The values, if they fit the classifier: it may have been replaced since they were given."""
    classes = getattr(model.backbone, "num_classes", None)
    if values and classes is not None and len(values) != classes:
        logger.warning("%s: %d of them do not fit a model of %d classes, and are not saved", name, len(values), classes)
        return None
    return list(values) if values else None


def _clear(folder: Path, names: list[str]) -> None:
    """Deletes what an earlier model left in its folder; in other folders, files of these names are somebody else's."""
    if (folder / REDUCERS).is_file():
        for name in names:
            (folder / name).unlink(missing_ok=True)


def _write_tensors(path: Path, module: nn.Module, half: bool) -> None:
    tensors = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def load_reduced(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: nn.Module | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **unknown: Any,
) -> ReducedTransformer:
    """Loads a reduced model, in eval mode.

    Args:
        name: the name of an embedded model, a folder, or a hub id.
        weights: a weights file for the backbone, where the folder holds none.
        backbone: a ready backbone, with its weights, to use instead of building one.
        device: where to put the model; "auto" is CUDA where there is any.

    Raises:
        ConfigError: options that do not exist or do not go together, or a device that cannot be used.
        WeightsError: files that are missing, damaged or of another shape.
        HubError: a hub id that cannot be had.
    """
    if unknown:
        known = [key for key, value in inspect.signature(load_reduced).parameters.items() if value.kind is value.KEYWORD_ONLY]
        raise ConfigError(f"load_reduced: {unknown_key(next(iter(unknown)), known)}")
    if not isinstance(name, (str, Path)):
        raise ConfigError(f"name: got {name!r}, wanted the name of an embedded model, a folder, or a hub id")
    if backbone is not None and weights is not None:
        raise ConfigError("weights: got a file beside a ready backbone=, which brings its own; give one of the two")
    where = pick_device(str(device))
    options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
    folder = find_model(str(name), local_files_only=local_files_only, **options)
    config = read_config(folder)
    labels = read_labels(folder, config.backbone.arguments.num_classes)
    if backbone is None:
        backbone, source = _build_backbone(config.backbone, config.data, folder, weights)
        try:
            model = ReducedTransformer(backbone, config.reduction)
        except (ConfigError, UnsupportedBackboneError) as error:  # both come out of the file
            raise WeightsError(f"{folder / 'config.json'}: {error}") from None
    else:
        reduction = config.reduction
        if reduction.second_look and not names_classes(backbone):
            logger.info("this backbone names no classes: no second look")
            reduction = reduction.model_copy(update={"second_look": 0.0})
        model, source = ReducedTransformer(backbone, reduction), None
    load_tensors(model.reducers, folder / REDUCERS)
    classes = getattr(backbone, "num_classes", None)  # those of a ready backbone may be others
    if config.class_ids and not hasattr(backbone, "class_ids") and classes in (None, len(config.class_ids)):
        backbone.class_ids = list(config.class_ids)
    model.labels = labels if labels is not None and classes in (None, len(labels)) else None
    model.files = (folder / REDUCERS, *([source] if source else []))
    return model.to(where).eval()


def _build_backbone(spec: Backbone, data: Data, folder: Path, weights: str | Path | None) -> tuple[Any, Path | None]:
    """The backbone with weights and preprocessing, and the file that its weights came from, where it is known."""
    path, file = folder / "config.json", folder / BACKBONE if spec.included else embedded_weights(spec.architecture or "")
    file = file if weights is None else Path(weights)
    require_buildable(spec, path)
    name = ".".join(filter(None, (spec.architecture, spec.tag)))
    try:
        # The tag brings the preprocessing of its weights; the weights themselves are fetched only where there is no file.
        backbone: Any = (timm.create_model if file else pretrained_backbone)(name, **spec.arguments.as_given())
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, IARED2Error):
            raise
        why = f"timm cannot build {name!r} with these arguments ({_first_line(error)})"
        raise WeightsError(f"{path}: {why}; save the model again, or give it as `backbone=`") from None
    if file is not None:
        load_tensors(backbone, file)
    else:
        hub_id = (getattr(backbone, "pretrained_cfg", None) or {}).get("hf_hub_id")
        cached = try_to_load_from_cache(hub_id, "model.safetensors") if hub_id else None
        file = Path(cached) if isinstance(cached, str) else None
    backbone.pretrained_cfg = backbone.default_cfg = {**backbone.pretrained_cfg, **data.as_timm()}
    return backbone, file


def pretrained_backbone(name: str, **arguments: Any) -> nn.Module:
    """A timm model with its published weights.

    Raises:
        ConfigError: timm knows no such model.
        HubError: the weights cannot be fetched.
    """
    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name.partition('_')[0]}*")[:3]
        hint = f"timm knows for example {', '.join(near)}" if near else "`iared2 models` lists what can be loaded"
        raise ConfigError(f"model {name!r}: timm has no such model; {hint}")
    try:
        _require_hub()
        return timm.create_model(name, pretrained=True, **arguments)
    except (OSError, HfHubHTTPError, RuntimeError, ValueError) as error:
        raise HubError(
            f"the weights of {name!r} could not be fetched from the hub ({_first_line(error)}). Connect to the network, "
            "or download the safetensors file elsewhere and give it with --weights FILE"
        ) from None


def embedded_weights(name: str) -> Path | None:
    """The backbone's weights inside the package, where an embedded model has any."""
    folder = assets.find(name)
    path = None if folder is None else folder / BACKBONE
    return path if path is not None and path.is_file() else None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({_first_line(error)}); fetch it again") from None


def load_tensors(module: Any, path: Path, resample_positions: bool = False) -> None:
    """Loads a safetensors file strictly, casting to the module's dtype.

    Args:
        resample_positions: interpolate position embeddings of another grid (timm's ViTs only).

    Raises:
        WeightsError: the file is missing, damaged, or made for another model.
    """
    tensors = read_tensors(path)
    wanted = module.state_dict()
    if resample_positions and "pos_embed" in wanted and "pos_embed" in tensors:
        grid, prefix = module.patch_embed.grid_size, 0 if module.no_embed_class else module.num_prefix_tokens
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"].float(), list(grid), num_prefix_tokens=prefix)
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or surplus:
        parts = [f"lacks {missing[0]!r} and {len(missing) - 1} more"] if missing else []
        parts += [f"has {surplus[0]!r} and {len(surplus) - 1} more that the model does not know"] if surplus else []
        raise WeightsError(f"{path}: made for another model: it {', '.join(parts)}")
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in wanted.items():
        if tensors[name].numel() == value.numel() == 1:  # single numbers had no dimension before 0.1.0
            tensors[name] = tensors[name].reshape(value.shape)
        if tensors[name].shape != value.shape:
            raise WeightsError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(value.shape)}")
        tensors[name] = tensors[name].to(value.dtype)
        # Masks among the buffers may be infinite; what was learned may not.
        wrong = ~tensors[name].isfinite() if name in parameters else tensors[name].isnan()
        if wrong.any():
            raise WeightsError(f"{path}: {name} holds values that are not numbers (NaN or infinite); fetch or train the weights again")
    module.load_state_dict({name: tensors[name] for name in wanted})


def find_model(name: str, **options: Any) -> Path:
    """A model's folder: an embedded one, one on this machine, or one fetched from the hub.

    Args:
        options: as `huggingface_hub.snapshot_download` takes them.

    Raises:
        HubError: there is none of that name.
    """
    inside = assets.find(name)
    if inside is not None:
        return inside
    try:
        if Path(name).is_dir():
            return Path(name)
        if not options.get("local_files_only"):
            _require_hub()
        return Path(snapshot_download(name, allow_patterns=FILES, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        embedded = ", ".join(assets.embedded()) or "none"
        raise HubError(
            f"model {name!r}: not embedded ({embedded}), not a folder here, and not to be had from the hub "
            f"({_first_line(error)}). Check the name, connect to the network, or give the path of a model folder"
        ) from None


def _require_hub() -> None:
    """Fails at once where the hub's name cannot be resolved; the hub's own client would retry for half a minute."""
    host = urlparse(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE:
        raise OSError("offline mode is set by HF_HUB_OFFLINE")
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise OSError(f"{host} cannot be reached") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
