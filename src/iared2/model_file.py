"""The files of a model folder that are not tensors: read with suspicion, for they may come from anywhere, and a card."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from iared2.errors import WeightsError
from iared2.reduction import ReductionConfig
from iared2.settings import explain_validation

SCHEMA = 1
BACKBONE = "backbone.safetensors"
CARD_MARK = "<!-- iared2 wrote this card and rewrites it; delete this line to keep your own -->"
CARD = """---
library_name: iared2
pipeline_tag: image-classification
---
{mark}

# {name}, reduced

A vision transformer that drops, per image, the patches its interpreters score low ([IA-RED2](https://arxiv.org/abs/2106.12620)).

| | |
|---|---|
| backbone | {name}; its weights are {weights} |
| classes | {classes} |
| reduces before | blocks {blocks} |
| keep rule | {rule}; dropped tokens: {on_drop} |

```python
import iared2

model = iared2.ReducedTransformer.from_pretrained("FOLDER OR HUB ID"{more})
```

Nobody has said yet what data it was trained on, how accurate it is, or what it must not be used for.
"""

Size = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    """A number is no string here, and a string is no list; what a later version adds is passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class Arguments(_Part):
    """Arguments of the backbone's constructor. Any are allowed, but none of timm's factory: they fetch and unpickle files."""

    model_config = ConfigDict(extra="allow")

    num_classes: Annotated[int, Field(ge=0)] | None = None
    img_size: Size | None = None
    patch_size: Size | None = None
    global_pool: str | None = None
    dynamic_img_size: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_the_constructors(cls, data: Any) -> Any:
        factory = "cache_dir checkpoint_path features_only file model_name pretrained pretrained_cfg pretrained_cfg_overlay pruned".split()
        found = [key for key in factory if isinstance(data, dict) and key in data]
        if found:
            raise ValueError(f"{found[0]!r} is no argument of a backbone's constructor")
        return data

    def as_given(self) -> dict[str, Any]:
        """For `timm.create_model`; JSON knows no tuples."""
        return {key: tuple(value) if isinstance(value, list) else value for key, value in self.model_dump(exclude_unset=True).items()}


class Backbone(_Part):
    """How to have the backbone again.

    Attributes:
        included: whether its weights are in the folder.
        dropped: arguments it was built with that JSON cannot hold, so that timm cannot build it again.
    """

    architecture: str | None
    tag: Annotated[str, Field(pattern=r"^[\w-]+$")] | None
    arguments: Arguments
    included: bool
    dropped: list[str] = []


class Data(_Part):
    """Preprocessing in timm's words."""

    input_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    mean: list[Finite]
    std: list[Spread]
    crop_pct: Spread
    crop_mode: Literal["center", "squash", "border"]

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "Data":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.input_size[0]):
                raise ValueError(f"{name}: got {len(values)} values, wanted one for each of {self.input_size[0]} channels")
        return self

    def as_timm(self) -> dict[str, Any]:
        """Entries of a `pretrained_cfg`."""
        return {key: tuple(value) if isinstance(value, list) else value for key, value in self.model_dump().items()}


class ModelFile(_Part):
    """config.json."""

    backbone: Backbone
    reduction: ReductionConfig
    data: Data
    class_ids: list[str] | None = None

    @model_validator(mode="after")
    def _one_id_per_class(self) -> "ModelFile":
        classes = self.backbone.arguments.num_classes
        if self.class_ids and classes is not None and len(self.class_ids) != classes:
            raise ValueError(f"class_ids: got {len(self.class_ids)}, wanted one for each of {classes} classes")
        return self


def read_config(folder: Path) -> ModelFile:
    """The checked config.json of a model folder.

    Raises:
        WeightsError: it is missing, damaged, or of a later version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json in it; a model folder is what `save_pretrained` writes")
    config = _read_json(path, "save the model again")
    if not isinstance(config, dict) or config.get("library") != "iared2":
        raise WeightsError(f"{path}: not written by iared2; a model folder is what `save_pretrained` writes")
    _check_schema(path, config.get("schema"))
    for part, keys in (("reduction", set()), ("data", set()), ("backbone", {"architecture", "tag", "arguments", "included"})):
        lacks = {part} - set(config) or keys - set(config[part] if isinstance(config[part], dict) else ())
        if lacks:
            raise WeightsError(f"{path}: {part!r} lacks {', '.join(sorted(lacks))}; save the model again")
    try:
        return ModelFile.model_validate(config)
    except ValidationError as error:
        raise WeightsError(f"{path}: {str(explain_validation(error))[:400]}; save the model again") from None


def _check_schema(path: Path, schema: Any) -> None:
    if type(schema) is not int or schema < 1:  # True is an int, too
        kind = type(schema).__name__
        raise WeightsError(f"{path}: schema {schema} ({kind}), wanted a whole number from 1 to {SCHEMA}; save the model again")
    if schema > SCHEMA:
        raise WeightsError(f"{path}: schema {schema}, but this version reads up to {SCHEMA}; upgrade iared2")


def require_buildable(spec: Backbone, path: Path) -> None:
    """Fails where timm could not build the backbone, or would silently build another one.

    Raises:
        WeightsError: with what to do instead.
    """
    if spec.architecture is None:
        raise WeightsError(f"{path}: the backbone is not a named timm model; give it as `backbone=`")
    if spec.dropped:
        weights = f", load {BACKBONE} into it," if spec.included else ""
        raise WeightsError(
            f"{path}: the backbone was made with {', '.join(spec.dropped)}, which no file can hold; "
            f"make it the same way{weights} and give it as `backbone=`"
        )
    if not re.fullmatch(r"\w+", spec.architecture) or not timm.is_model(spec.architecture):
        raise WeightsError(
            f"{path}: timm {timm.__version__} has no architecture {spec.architecture!r}; upgrade timm, or give the model as `backbone=`"
        )


def read_labels(folder: Path, classes: int | None) -> list[str] | None:
    """The class names of a model folder, where it has any.

    Args:
        classes: how many there must be, where that is known.

    Raises:
        WeightsError: the file is damaged, or made for another number of classes.
    """
    path = folder / "labels.json"
    if not path.is_file():
        return None
    labels = _read_json(path, "it holds a list of class names")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise WeightsError(f"{path}: got something else than a list of class names")
    if classes is not None and len(labels) != classes:
        raise WeightsError(f"{path}: got {len(labels)} class names for a model of {classes} classes; correct the file, or delete it")
    return labels


def _read_json(path: Path, wanted: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise WeightsError(f"{path}: nested too deeply; {wanted}") from None
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor even text, or a number of thousands of digits
        raise WeightsError(f"{path}: not valid JSON ({error}); {wanted}") from None


def _words(reduction: dict[str, Any]) -> str:
    """What becomes of dropped tokens."""
    heir = {"merge": "the most similar kept one", "fuse": "the best of them"}.get(reduction["on_drop"])
    if heir is None:
        return "gone"
    return f"gone, but counted by {heir}" if reduction["weights"] == "kept" else f"averaged into {heir}"


def write_card(folder: Path, config: dict[str, Any]) -> None:
    """A card that says what is known here and no more, unless somebody wrote one; the hub's own would be a form with its fields empty."""
    path = folder / "README.md"
    if path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    backbone, reduction = config["backbone"], config["reduction"]
    rebuilt = backbone["architecture"] is not None and not backbone["dropped"]
    published = None if backbone["included"] else backbone["tag"]  # weights in the folder are no longer those of the tag
    card = CARD.format(
        mark=CARD_MARK,
        name=".".join(filter(None, (backbone["architecture"], published))) or "a vision transformer",
        weights="in this folder" if backbone["included"] else "not in this folder, which holds only what reduction added",
        classes=backbone["arguments"].get("num_classes", "unknown"),
        blocks=", ".join(map(str, reduction["first_blocks"])),
        rule=reduction["rule"],
        on_drop=_words(reduction),
        more="" if rebuilt else ", backbone=...",
    )
    path.write_text(card, encoding="utf-8")
