"""Reduced models on disk: a versioned config.json, and safetensors with what reduction added.

| file | content |
|---|---|
| config.json | schema version, the backbone's recipe for timm, the reduction's settings, preprocessing |
| reducers.safetensors | interpreters |
| backbone.safetensors | the backbone, only where it was trained after reduction or cannot be had otherwise |
| labels.json | class names in the order of the logits, where the model knows them |
"""

import hashlib
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import nn

from iared2 import assets
from iared2.errors import ConfigError, HubError, WeightsError
from iared2.model import ReducedTransformer
from iared2.reduction import ReductionConfig
from iared2.settings import explain_validation

SCHEMA = 1
FILES = ["config.json", "labels.json", "*.safetensors", "README.md"]


def backbone_spec(backbone: Any) -> dict[str, Any]:
    """What `timm.create_model` needs to build this backbone again, without weights."""
    known = getattr(backbone, "pretrained_cfg", None) or {}
    given = {k: v for k, v in getattr(backbone, "_model_args", {}).items() if _plain(v) and k != "patch_drop_rate"}
    embed = backbone.patch_embed
    seen: dict[str, Any] = {"num_classes": backbone.num_classes, "img_size": list(embed.img_size)}
    if type(embed) is PatchEmbed:
        seen["patch_size"] = list(embed.patch_size)
    if getattr(backbone, "dynamic_img_size", False):
        seen["dynamic_img_size"] = True
    if backbone.global_pool != "token":
        seen["global_pool"] = backbone.global_pool
    return {"architecture": known.get("architecture"), "tag": known.get("tag") or None, "arguments": {**given, **seen}}


def _plain(value: Any) -> bool:
    """Whether a value survives JSON."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def save_reduced(model: ReducedTransformer, folder: Path, with_backbone: bool | None = None, half: bool = False) -> None:
    """Writes a reduced model into a folder.

    Args:
        with_backbone: whether to write the backbone's weights; None writes them if they were trained since reduction.
        half: store fp16 (loading gives fp32 back).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with_backbone = model.backbone_trained if with_backbone is None else with_backbone
    data = timm.data.resolve_model_data_config(model.backbone)
    config = {
        "schema": SCHEMA,
        "library": "iared2",
        "backbone": backbone_spec(model.backbone) | {"included": with_backbone},
        "reduction": model.config.model_dump(mode="json"),
        "data": {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        "class_ids": getattr(model.backbone, "class_ids", None),
    }
    _write_tensors(folder / "reducers.safetensors", model.reducers, half)
    if with_backbone:
        _write_tensors(folder / "backbone.safetensors", model.backbone, half)
    if model.labels is not None:
        (folder / "labels.json").write_text(json.dumps(model.labels, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tensors(path: Path, module: nn.Module, half: bool) -> None:
    tensors = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def load_reduced(
    name: str,
    *,
    weights: str | Path | None = None,
    backbone: nn.Module | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **_: Any,
) -> ReducedTransformer:
    """Loads a reduced model, in eval mode.

    Args:
        name: the name of an embedded model, a folder, or a hub id.
        weights: a weights file for the backbone, where the folder holds none.
        backbone: a ready backbone to use instead of building one.

    Raises:
        WeightsError: files that are missing, damaged or of another shape.
        HubError: a hub id that cannot be had.
    """
    folder = assets.find(name)
    if folder is None and Path(name).is_dir():
        folder = Path(name)
    if folder is None:
        folder = _download(
            name, revision=revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token
        )
    config = _read_config(folder)
    try:
        reduction = ReductionConfig.model_validate(config["reduction"])
    except ValidationError as error:
        raise WeightsError(f"{folder / 'config.json'}: {explain_validation(error)}") from None
    built = backbone is None
    if backbone is None:
        backbone = _build_backbone(config["backbone"], folder, weights)
    if config.get("class_ids") and not hasattr(backbone, "class_ids"):
        backbone.class_ids = list(config["class_ids"])
    model = ReducedTransformer(backbone, reduction)
    load_tensors(model.reducers, folder / "reducers.safetensors")
    model.labels = _read_labels(folder)
    source = _backbone_file(config["backbone"], folder, weights, backbone) if built else None
    model.files = (folder / "reducers.safetensors", *([source] if source else []))
    return model.to(device).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json in it; a model folder is what `save_pretrained` writes")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); save the model again") from None
    if not isinstance(config, dict) or config.get("library") != "iared2":
        raise WeightsError(f"{path}: not written by iared2; a model folder is what `save_pretrained` writes")
    schema = config.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise WeightsError(f"{path}: schema {schema}, but this version reads up to {SCHEMA}; upgrade iared2")
    for part, keys in (("reduction", set()), ("backbone", {"architecture", "tag", "arguments", "included"})):
        lacks = {part} - set(config) or keys - set(config[part] if isinstance(config[part], dict) else ())
        if lacks:
            raise WeightsError(f"{path}: {part!r} lacks {', '.join(sorted(lacks))}; save the model again")
    return config


def _read_labels(folder: Path) -> list[str] | None:
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); it holds a list of class names") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise WeightsError(f"{path}: got something else than a list of class names")
    return labels


def _backbone_file(spec: dict[str, Any], folder: Path, weights: str | Path | None, backbone: nn.Module) -> Path | None:
    """The file that a built backbone's weights came from, where it is known."""
    if weights is not None:
        return Path(weights)
    if spec["included"]:
        return folder / "backbone.safetensors"
    hub_id = (getattr(backbone, "pretrained_cfg", None) or {}).get("hf_hub_id")
    cached = try_to_load_from_cache(hub_id, "model.safetensors") if hub_id else None
    return Path(cached) if isinstance(cached, str) else None


def _build_backbone(spec: dict[str, Any], folder: Path, weights: str | Path | None) -> Any:
    architecture, arguments = spec["architecture"], dict(spec["arguments"])
    if architecture is None:
        raise WeightsError(f"{folder}: the backbone is not a named timm model; give it as `backbone=`")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    if spec["included"] or weights is not None:
        backbone = timm.create_model(architecture, **arguments)
        load_tensors(backbone, Path(weights) if weights is not None else folder / "backbone.safetensors")
        return backbone
    full_name = architecture if spec["tag"] is None else f"{architecture}.{spec['tag']}"
    return pretrained_backbone(full_name, **arguments)


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
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise WeightsError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(value.shape)}")
    module.load_state_dict({name: tensors[name].to(value.dtype) for name, value in wanted.items()})


def _download(name: str, **options: Any) -> Path:
    try:
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
