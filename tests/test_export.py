"""ONNX: static top-k models run in onnxruntime with equal logits, for any batch size."""

import pytest
import torch

import iared2
from families import FAMILIES
from iared2 import export
from iared2.errors import ConfigError

pytestmark = pytest.mark.untyped  # torch.export cannot trace through the shape checks


def _model(name: str, on_drop: str, **settings) -> iared2.ReducedTransformer:
    chosen = {"rule": "top_k", "ratios": (0.7, 0.3), **settings}
    model = iared2.reduce(FAMILIES[name].build(), groups=2, on_drop=on_drop, **chosen).eval()
    for parameter in model.reducers.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(
    ("name", "on_drop"), [("deit", "discard"), ("deit", "merge"), ("deit", "fuse"), ("avg", "merge"), ("siglip", "discard")]
)
def test_top_k_runs_in_onnxruntime(name, on_drop, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = _model(name, on_drop).train()
    path = export.export_onnx(model, tmp_path / "deep" / "model.onnx")
    assert model.training  # as it was
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model.eval()
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            wanted = model(images)
        (got,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("on_drop", "pairs"), [("merge", False), ("discard", True)])
def test_chances_that_know_of_better_tokens_run_there_too(tmp_path, on_drop, pairs):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    options = {"rule": "top_k", "ratios": (0.7, 0.3), "place": "between", "on_drop": on_drop}
    options["worth"] = iared2.worth.WorthConfig(pairs=pairs)
    options["skip_unread"] = True
    model = iared2.reduce(FAMILIES["deit"].build(), 2, **options).eval()
    for reducer in model.reducers:
        torch.nn.init.normal_(reducer.interpreter.query.weight, std=0.7)
    session = onnxruntime.InferenceSession(export.export_onnx(model, tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 32, 32)
    (got,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(images), rtol=1e-4, atol=1e-4)


def test_other_rules_are_refused(tmp_path):
    model = _model("deit", "discard", rule="threshold")
    with pytest.raises(ConfigError, match=r"configure\(rule='top_k', ratios=\(0.7, 0.49,\)\)"):
        export.export_onnx(model, tmp_path / "model.onnx")


def test_pooling_that_needs_each_image_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="on_drop='discard'"):
        export.export_onnx(_model("max", "merge"), tmp_path / "model.onnx")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript not installed; run pip install 'iared2\[onnx\]'"):
        export.export_onnx(_model("deit", "discard"), tmp_path / "model.onnx")
