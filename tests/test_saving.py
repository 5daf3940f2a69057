"""Model folders: the model that is loaded is the one that was saved, and a folder that cannot give it says so in one line."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import iared2
from families import FAMILIES, randomised
from iared2.errors import ConfigError, HubError, WeightsError
from iared2.model import ReducedTransformer, reduce
from iared2.saving import backbone_spec, load_reduced, load_tensors, save_reduced
from iared2.worth import WorthConfig

TINY = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **{**TINY, **options})).eval()


def trained(backbone: nn.Module) -> ReducedTransformer:
    """Reduced, and its backbone trained since."""
    model = reduce(backbone, 2).eval()
    backbone.blocks[0].mlp.fc1.weight.data += 0.1
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that holds a model with its backbone and labels."""
    model = trained(build())
    model.labels, model.backbone.class_ids = list("abcdefg"), list("hijklmn")
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "model")


def rewrite(folder: Path, change: dict, part: str | None = None, inner: str | None = None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    target = config if part is None else config[part] if inner is None else config[part][inner]
    target.update(change)
    path.write_text(json.dumps(config))


def refused(folder: Path | str, error: type = WeightsError, **options) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(error) as caught:
        load_reduced(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the same model again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"block_fn": ResPostBlock, "init_values": 1e-5}, {"act_layer": nn.ReLU}, {"norm_layer": nn.LayerNorm, "act_layer": nn.ReLU}]
)
def test_arguments_that_json_cannot_hold_are_named_and_the_backbone_asked_for(options, tmp_path):
    model = trained(build(**options))
    model.save_pretrained(tmp_path)
    dropped = sorted(set(options) - {"init_values"})
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["dropped"] == dropped
    for more in ({}, {"weights": tmp_path / "backbone.safetensors"}):
        message = refused(tmp_path, **more)
        assert "backbone=" in message and all(name in message for name in dropped)
    assert torch.equal(load_reduced(tmp_path, backbone=model.backbone)(IMAGES), model(IMAGES))


def test_arguments_that_json_can_hold_are_kept(tmp_path):
    model = trained(build(act_layer="relu", qkv_bias=False, in_chans=1))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["dropped"] == []
    assert torch.equal(load_reduced(tmp_path)(IMAGES[:, :1]), model(IMAGES[:, :1]))


def test_our_own_architectures_need_no_argument_that_json_cannot_hold():
    assert backbone_spec(timm.create_model("iared2_mini_patch8_96", num_classes=7))["dropped"] == []


@pytest.mark.parametrize(("made", "later"), [("avg", "token"), ("token", "avg"), ("map", "token"), ("avg", ""), ("map", None)])
def test_the_present_pooling_is_saved(made, later, tmp_path):
    model = trained(build(global_pool=made))
    model.reset_classifier(5, later)
    model.save_pretrained(tmp_path)
    again = load_reduced(tmp_path)
    assert again.backbone.global_pool == model.backbone.global_pool == (made if later is None else later)
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_how_tokens_are_handed_over_survives(tmp_path):
    latest = {"similarity": "tokens", "weights": "score", "keep_length": True, "worth": WorthConfig(), "place": "between"}
    model = reduce(build(), 2, on_drop="merge", **latest).eval()
    for parameter in model.reducers.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    loaded = load_reduced(tmp_path, backbone=build())
    assert loaded.config == model.config and (loaded.config.similarity, loaded.config.weights) == ("tokens", "score")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_preprocessing_survives(tmp_path):
    model = trained(build("vit_base_patch16_224.mae"))
    model.backbone.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 64, 64))
    model.backbone.pretrained_cfg.update(interpolation="bilinear", crop_pct=0.7, crop_mode="squash")
    model.save_pretrained(tmp_path)
    again = load_reduced(tmp_path)
    assert timm.data.resolve_model_data_config(again) == timm.data.resolve_model_data_config(model)
    assert again.pretrained_cfg["tag"] == "mae"
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_preprocessing_of_the_tag_survives(tmp_path):
    model = trained(build("vit_base_patch16_clip_224.openai"))
    model.save_pretrained(tmp_path)
    assert timm.data.resolve_model_data_config(model)["mean"][0] == pytest.approx(0.481, abs=1e-3)
    assert timm.data.resolve_model_data_config(load_reduced(tmp_path)) == timm.data.resolve_model_data_config(model)


def test_published_weights_come_with_the_saved_preprocessing(tmp_path, monkeypatch):
    """No network here: what would be fetched is built instead."""
    model = reduce(build("vit_base_patch16_224.mae"), 2)
    model.backbone.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("iared2.saving.pretrained_backbone", lambda name, **more: asked.append(name) or timm.create_model(name, **more))
    assert load_reduced(tmp_path).pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and asked == ["vit_base_patch16_224.mae"]


def test_a_loaded_model_is_saved_again_with_the_weights_that_nobody_else_has(whole, tmp_path):
    model = load_reduced(whole)
    model.threshold = 0.4
    model.save_pretrained(tmp_path)
    assert torch.equal(load_reduced(tmp_path)(IMAGES), model(IMAGES))
    load_reduced(tmp_path).save_pretrained(tmp_path)
    assert torch.equal(load_reduced(tmp_path)(IMAGES), model(IMAGES))


def test_a_backbone_that_timm_does_not_name_is_saved_and_asked_for(tmp_path):
    model = reduce(FAMILIES["deit"].build(), 2).eval()
    model.save_pretrained(tmp_path)
    assert "not a named timm model; give it as `backbone=`" in refused(tmp_path)
    images = FAMILIES["deit"].images(2)
    assert torch.equal(load_reduced(tmp_path, backbone=model.backbone)(images), model(images))


# ---- was the backbone trained? -----------------------------------------------------------------------------


class WithBuffer(nn.Module):
    """Some of everything that a state dict may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)  # not contiguous
        self.narrow = nn.Parameter(torch.arange(4.0).bfloat16())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.data.copy_(m.weight.data.flip(0)),
        lambda m: m.narrow.data.copy_(m.narrow.data.flip(0)),
        lambda m: m.count.add_(1),
        lambda m: m.weight.data.neg_(),
    ],
    ids=["permuted", "permuted bfloat16", "buffer", "sign"],
)
def test_every_change_of_bits_is_noticed(change):
    from iared2.model import _fingerprint

    module = WithBuffer()
    before = _fingerprint(module)
    assert _fingerprint(WithBuffer()) == before
    change(module)
    assert _fingerprint(module) != before


def test_permuted_weights_are_trained_weights():
    backbone = build()
    model = reduce(backbone, 2)
    backbone.blocks[0].mlp.fc1.weight.data = backbone.blocks[0].mlp.fc1.weight.data.flip(0)
    assert model.backbone_trained


def test_another_number_of_threads_trains_nothing():
    """The order of a float sum changes with the threads, and its last digits with the order."""
    threads = torch.get_num_threads()
    model = reduce(timm.create_model("vit_tiny_patch16_224", depth=2), 2)
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            assert not model.backbone_trained
    finally:
        torch.set_num_threads(threads)


def test_backbones_without_values_can_be_reduced():
    assert not reduce(timm.create_model("vit_tiny_patch16_224").to("meta"), 3).backbone_trained


# ---- damaged folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nope_model", 3, "resnet18", "", "hf-hub:timm/vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg"])
def test_architectures_that_cannot_be_built(folder, name):
    rewrite(folder, {"architecture": name}, "backbone")
    assert "config.json" in refused(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"foo": 1}, "foo"),
        ({"num_classes": "x"}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"img_size": "x"}, "img_size"),
        ({"img_size": [64]}, "img_size"),
        ({"img_size": -1}, "img_size"),
        ({"embed_dim": 32}, "divisible"),
        ({"embed_dim": 24}, "shape"),
        ({"num_heads": 7}, "divisible"),
        ({"num_heads": 0}, "num_heads=0|zero"),
        ({"depth": "x"}, "timm cannot build"),
        ({"pretrained": True}, "'pretrained' is no argument"),
        ({"checkpoint_path": "/etc/passwd"}, "'checkpoint_path' is no argument"),
        ({"global_pool": 3}, "global_pool"),
    ],
)
def test_arguments_that_do_not_fit(folder, change, word):
    rewrite(folder, change, "backbone", "arguments")
    message = refused(folder)
    assert str(folder) in message and any(part in message for part in word.split("|"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"schema": 0}, "schema 0 (int), wanted a whole number from 1"),
        (None, {"schema": -3}, "schema -3 (int)"),
        (None, {"schema": True}, "schema True (bool)"),
        (None, {"schema": "1"}, "schema 1 (str), wanted a whole number from 1"),
        (None, {"schema": 2}, "upgrade iared2"),
        (None, {"class_ids": 5}, "class_ids"),
        (None, {"class_ids": [1, 2, 3, 4, 5, 6, 7]}, "class_ids"),
        (None, {"class_ids": ["a", "b"]}, "class_ids: got 2, wanted one for each of 7 classes"),
        (None, {"data": None}, "data"),
        (None, {"reduction": {"first_blocks": [0, 9]}}, "first_blocks: got block 9"),
        (None, {"reduction": {"first_blocks": [0], "interpreter": {"heads": 5}}}, "not divisible by 5 heads"),
        ("backbone", {"included": "no"}, "backbone.included"),
        ("backbone", {"included": 1}, "backbone.included"),
        ("backbone", {"arguments": None}, "backbone.arguments"),
        ("backbone", {"tag": "no_such_tag"}, "no_such_tag"),
        ("backbone", {"tag": "../x"}, "backbone.tag"),
        ("backbone", {"dropped": "act_layer"}, "backbone.dropped"),
        ("data", {"mean": [0.5, 0.5]}, "mean: got 2 values, wanted one for each of 3 channels"),
        ("data", {"mean": [0.5, float("nan"), 0.5]}, "data.mean"),
        ("data", {"std": [0.5, 0.0, 0.5]}, "data.std"),
        ("data", {"input_size": [3, 64]}, "data.input_size"),
        ("data", {"interpolation": "magic"}, "data.interpolation"),
        ("data", {"crop_pct": "1"}, "data.crop_pct"),
        ("data", {"crop_mode": 1}, "data.crop_mode"),
    ],
)
def test_values_of_another_kind_are_refused(folder, part, change, message):
    rewrite(folder, change, part)
    assert message in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "labels.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}", "", '"\\ud800'])
def test_json_that_breaks_its_reader(folder, name, content):
    (folder / name).write_text(content)
    assert name in refused(folder)


def test_entries_that_others_add_are_passed_over(folder):
    rewrite(folder, {"metrics": {"top1": 1.0}, "license": "mit"})
    rewrite(folder, {"later": 1}, "data")
    assert load_reduced(folder).labels == list("abcdefg")


def test_labels_of_another_model_are_refused(folder):
    (folder / "labels.json").write_text('["a", "b"]')
    assert "got 2 class names for a model of 7 classes" in refused(folder)


def test_a_ready_backbone_with_other_classes_gets_no_labels_that_do_not_fit(whole):
    model = load_reduced(whole, backbone=build(num_classes=3))
    assert model.labels is None and not hasattr(model.backbone, "class_ids")


# ---- how to ask for a model --------------------------------------------------------------------------------


def test_paths_and_strings_name_the_same_model(whole):
    assert torch.equal(load_reduced(whole)(IMAGES), load_reduced(str(whole))(IMAGES))
    assert load_reduced(Path("iared2_mini_patch8_96")).num_classes == 200


@pytest.mark.untyped
@pytest.mark.parametrize("name", [None, 3])
def test_no_name_at_all(name):
    assert f"got {name!r}, wanted the name of an embedded model" in refused(name, ConfigError)


def test_names_that_no_file_system_takes():
    for name in ("x" * 5000, "a\0b"):
        refused(name, HubError)


def test_options_that_do_not_exist_are_answered_with_the_nearest(whole):
    with pytest.raises(ConfigError, match="'wieghts'; did you mean 'weights'"):
        ReducedTransformer.from_pretrained(whole, wieghts="x")
    hub = {"revision": None, "cache_dir": None, "force_download": False, "local_files_only": False, "token": None}
    assert ReducedTransformer.from_pretrained(whole, **hub).num_classes == 7


def test_devices_and_weights_that_cannot_be(whole):
    assert "'foo'" in refused(whole, ConfigError, device="foo")
    assert "give one of the two" in refused(whole, ConfigError, backbone=build(), weights=whole / "backbone.safetensors")
    assert load_reduced(whole, device=torch.device("cpu")).num_classes == 7


# ---- what a folder holds -----------------------------------------------------------------------------------


def test_nothing_of_an_earlier_model_stays(folder):
    model = reduce(build(), 2)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "reducers.safetensors", "README.md"}
    assert load_reduced(folder, backbone=build()).labels is None


def test_what_is_not_ours_stays(tmp_path):
    """A run's folder has its dense weights under the same name."""
    save_file({"x": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    reduce(build(), 2).save_pretrained(tmp_path)
    assert (tmp_path / "backbone.safetensors").exists()


def test_labels_of_a_classifier_that_was_replaced_are_not_saved(whole, tmp_path, caplog):
    model = load_reduced(whole)
    model.reset_classifier(5)
    model.save_pretrained(tmp_path)
    again = load_reduced(tmp_path)
    assert again.labels is None and not hasattr(again.backbone, "class_ids") and "do not fit a model of 5 classes" in caplog.text
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_card_says_what_is_known(whole, tmp_path):
    card = (whole / "README.md").read_text()
    assert "More Information Needed" not in card
    assert all(part in card for part in ("vit_tiny_patch16_224", "in this folder", "| 7 |", "blocks 0, 2", "how accurate"))
    reduce(build(), (1,)).save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert "augreg" in again and "augreg" not in card  # the name of published weights, only where they are meant
    assert "not in this folder" in again and "before | blocks 1 |" in again
    trained(build()).save_pretrained(tmp_path)
    assert "blocks 0, 2" in (tmp_path / "README.md").read_text()  # ours follows the model
    reduce(build(), (1,), on_drop="merge", weights="kept").save_pretrained(tmp_path)
    assert "gone, but counted by the most similar kept one" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    save_reduced(reduce(build(), 2), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["trained", "untouched"])
def test_what_is_pushed_to_the_hub(kind, monkeypatch):
    created, uploaded = [], {}

    class Repo:
        repo_id = "someone/model"

    def upload(self, *, repo_id, folder_path, **_):
        uploaded.update({path.relative_to(folder_path).as_posix(): path.read_bytes() for path in Path(folder_path).rglob("*")})
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda _, **options: created.append(options) or Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = trained(build()) if kind == "trained" else reduce(build(), 2)
    model.labels = list("abcdefg")
    assert model.push_to_hub("someone/model", private=True) == "https://hub/someone/model"
    assert created[0]["repo_id"] == "someone/model" and created[0]["private"] is True
    more = {"backbone.safetensors"} if kind == "trained" else set()
    assert set(uploaded) == {"config.json", "reducers.safetensors", "labels.json", "README.md"} | more
    assert b"More Information Needed" not in uploaded["README.md"] and json.loads(uploaded["config.json"])["library"] == "iared2"


def test_what_is_pulled_from_the_hub_is_what_was_pushed(whole, monkeypatch):
    monkeypatch.setattr("iared2.saving._require_hub", lambda: None)
    asked = {}
    monkeypatch.setattr("iared2.saving.snapshot_download", lambda name, **options: asked.update(options, name=name) or str(whole))
    assert iared2.ReducedTransformer.from_pretrained("someone/model", revision="v1").labels == list("abcdefg")
    assert asked["name"] == "someone/model" and asked["revision"] == "v1" and asked["local_files_only"] is False


def test_numbers_without_a_dimension_are_taken_from_older_models(tmp_path: Path) -> None:
    model = reduce(build(), (1, 2), place="between", worth=WorthConfig(redundancy=0.3), on_drop="merge").eval()
    save_reduced(model, tmp_path, with_backbone=True)
    path = tmp_path / "reducers.safetensors"
    tensors = load_file(path)
    assert tensors["0.worth.redundancy"].shape == (1,)
    save_file({name: value.reshape(()) if value.numel() == 1 else value for name, value in tensors.items()}, path)
    assert torch.equal(load_reduced(tmp_path)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, value: str) -> None:
    model = load_reduced("iared2_mini_patch8_96")
    model.backbone.blocks[3].mlp.fc1.weight.data[0, 0] = float(value)
    save_reduced(model, tmp_path, with_backbone=True)
    with pytest.raises(WeightsError, match=r"blocks\.3\.mlp\.fc1\.weight holds values that are not numbers"):
        load_reduced(tmp_path)
    next(model.reducers[1].parameters()).data.view(-1)[0] = float(value)
    save_reduced(model, tmp_path, with_backbone=False)
    with pytest.raises(WeightsError, match=r"1\..* holds values that are not numbers \(NaN or infinite\)"):
        load_reduced(tmp_path, backbone=load_reduced("iared2_mini_patch8_96").backbone)


def test_weights_are_checked_as_the_model_will_hold_them(tmp_path: Path) -> None:
    """A number of 64 bits may be none of 32; one of 8 has no test of its own; a tied parameter has two names."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    path, good = tmp_path / "weights.safetensors", {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in (("0.bias", torch.full((2,), 1e300, dtype=torch.float64)), ("1.weight", torch.full((2, 2), float("inf")))):
        save_file({**good, name: value}, path)
        with pytest.raises(WeightsError, match=f"{name} holds values that are not numbers"):
            load_tensors(module, path)
    save_file({**good, "0.bias": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn)}, path)
    load_tensors(module, path)
    assert module[0].bias.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(("value", "fits"), [("-inf", True), ("nan", False)])
def test_a_mask_may_be_infinite(tmp_path: Path, value: str, fits: bool) -> None:
    """Backbones keep attention masks as buffers."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, float(value)]))
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    with nullcontext() if fits else pytest.raises(WeightsError, match="mask holds values that are not numbers"):
        load_tensors(module, tmp_path / "weights.safetensors")
