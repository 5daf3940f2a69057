"""Recipes validate, explain themselves, take overrides, and run from end to end."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from iared2.errors import ConfigError, WeightsError
from iared2.model import ReducedTransformer
from iared2.train.recipes import RECIPES, Recipe, find_recipe, parse_overrides
from iared2.train.run import build_backbone, run_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_validates_and_names_cost_result_and_command(name: str) -> None:
    doc = RECIPES[name].__doc__ or ""
    for line in ("Cost:", "Expected:", f"Command: iared2 train {name}"):
        assert line in doc
    recipe = find_recipe(name)
    assert recipe.name == name
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = find_recipe("paper_deit_small")
    reduction = recipe.reduction
    assert reduction is not None and recipe.data.batch_size == 32
    assert (reduction.groups, reduction.interpreter_epochs, reduction.block_epochs) == (3, 10, 20)
    assert (reduction.reward.error_penalty, reduction.reward.shape, reduction.on_drop) == (1.5, "square", "discard")
    optim = reduction.interpreter_optim
    assert (optim.optimizer, optim.lr, optim.schedule, optim.weight_decay) == ("adam", 4e-5, "cosine", 0)
    assert not reduction.train_head and not reduction.interpreter.norm and reduction.warm_start_epochs == 0


def test_overrides_reach_nested_fields() -> None:
    recipe = find_recipe("paper_deit_small", ["--reduction.reward.error-penalty=0.5", "data.batch_size=8", "--reduction.groups", "[4, 8]"])
    assert recipe.reduction is not None
    assert (recipe.reduction.reward.error_penalty, recipe.data.batch_size, recipe.reduction.groups) == (0.5, 8, (4, 8))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_sise=8", "unknown setting 'batch_sise'; did you mean 'batch_size'?"),
        ("redution.groups=2", "unknown setting 'redution'; did you mean 'reduction'?"),
        ("data.batch_size=0", "data.batch_size: Input should be greater than 0 (got 0)"),
        ("data.batch_size=many", "data.batch_size: Input should be a valid integer"),
        ("reduction.on_drop=throw", "reduction.on_drop: Input should be 'discard', 'merge' or 'fuse' (got 'throw')"),
        ("reduction.warm_start_epochs=1", "warm_start_ratios: got 0, wanted one for each of 3 groups"),
        ("nonsense", "wanted section.field=value"),
        ("dense.epochs=2", "'dense' is None in this recipe and has no fields to set"),
    ],
)
def test_a_wrong_override_is_answered_with_the_right_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("paper_deit_small", [override])
    assert message in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'paper_deit_smal'; did you mean 'paper_deit_small'"):
        find_recipe("paper_deit_smal")


def test_values_parse_as_json_and_else_as_text() -> None:
    assert parse_overrides(["a.b=1e-3", "--c=null", "d=name", "--e", "[1]"]) == [
        ("a.b", 1e-3),
        ("c", None),
        ("d", "name"),
        ("e", [1]),
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label, shade in (("ants", 40), ("bees", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 36), (shade, shade + 5 * i, 90)).save(tmp_path / "data" / label / f"{i}.png")
    (tmp_path / "data" / "ants" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "data"


ARGUMENTS = {"img_size": 32, "patch_size": 8, "num_classes": 2}
RUN = [
    f"backbone.arguments={json.dumps(ARGUMENTS)}",
    "backbone.model=test_vit",
    "reduction.groups=2",
    "reduction.interpreter_epochs=1",
    "reduction.block_epochs=1",
    "data.batch_size=4",
    "data.held_out=4",
    "reduction.on_drop=merge",
]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_recipe_runs_from_folder_to_model(pictures: Path, tmp_path: Path, in_memory: bool) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", **ARGUMENTS).state_dict(), tmp_path / "vit.safetensors")
    common = {"data": pictures, "weights": tmp_path / "vit.safetensors", "device": "cpu", "dtype": "float32", "workers": 0, "seed": 1}
    out = tmp_path / "run"
    overrides = [*RUN, f"data.in_memory={json.dumps(in_memory)}"]
    assert run_recipe("paper_deit_small", overrides, output=out, **common) == 0
    model = ReducedTransformer.from_pretrained(out / "model")
    assert model.config.on_drop == "merge" and model.num_classes == 2
    assert (out / "model" / "backbone.safetensors").is_file(), "blocks were fine-tuned, so they must be saved"
    logits, trace = model.trace(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 2) and trace.groups == 2
    assert {path.name for path in (out / "reduction" / "logs").glob("*-?.csv")} == {
        f"{k}-{g}.csv" for k in ("interpreter", "blocks") for g in (1, 2)
    }


def test_a_dense_vit_trains_from_scratch_and_is_reduced_in_one_recipe(pictures: Path, tmp_path: Path) -> None:
    dense = {"epochs": 2, "patch_drop": [0.5, 0.0], "optim": {"optimizer": "adamw", "lr": 1e-3}}
    overrides = [*RUN, f"dense={json.dumps(dense)}", "data.in_memory=true"]
    common = {"data": pictures, "weights": None, "device": "cpu", "dtype": "float32", "workers": 0, "seed": 1}
    assert run_recipe("paper_deit_small", overrides, output=tmp_path / "run", **common) == 0
    model = ReducedTransformer.from_pretrained(tmp_path / "run" / "model")
    model.train()
    first, second = (model(torch.ones(1, 3, 32, 32)) for _ in range(2))
    assert torch.equal(first, second), "patch dropout belongs to the dense training, not to the model"


def test_training_without_data_says_how_to_name_some(tmp_path: Path) -> None:
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", **ARGUMENTS).state_dict(), weights)
    common = {"data": None, "weights": weights, "device": "cpu", "dtype": "float32", "workers": 0, "seed": None}
    with pytest.raises(ConfigError, match="--data FOLDER"):
        run_recipe("paper_deit_small", RUN, output=tmp_path / "run", **common)


def test_training_goes_on_from_weights_of_a_coarser_grid(tmp_path: Path) -> None:
    """The position embeddings are interpolated where the recipe says so; else another shape is refused."""
    coarse = timm.create_model("iared2_mini_patch8_64").eval()
    save_file(coarse.state_dict(), tmp_path / "coarse.safetensors")
    recipe = find_recipe("mini_finer", [f"backbone.weights={tmp_path / 'coarse.safetensors'}", "dense.patch_drop=[]"])
    fine = build_backbone(recipe).eval()
    images = torch.rand(1, 3, 96, 96)
    assert fine.pos_embed.shape == (1, 145, 160)
    assert torch.allclose(fine(images), coarse(images), atol=1e-5)  # as timm's own interpolation for another input size
    refused = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"resample_positions": False})})
    with pytest.raises(WeightsError, match=r"pos_embed has shape \(1, 65, 160\), the model wants \(1, 145, 160\)"):
        build_backbone(refused)
