"""Importing: fast, lazy, and possible beside a torchvision whose compiled operators do not fit."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import iared2


def run(code: str, **options) -> str:
    """What a fresh interpreter prints for this code."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_waits_for_no_heavy_import():
    code = """
        import sys, iared2.cli
        print([name for name in ("torch", "timm", "torchvision", "matplotlib", "accelerate") if name in sys.modules])
    """
    assert run(code).strip() == "[]"


def test_public_names_are_there_when_asked_for():
    for name in iared2.__all__:
        assert getattr(iared2, name).__name__ == name
        assert name in dir(iared2)
    with pytest.raises(AttributeError, match="no attribute 'redcue'"):
        _ = iared2.redcue


FAKE = """
    import torch
    from torch.library import register_fake
    if COMPILED:
        torch.ops.load_library(__file__.replace("__init__.py", "_C.so"))
    register_fake("torchvision::nms")(lambda *a: None)  # as torchvision does; fails where nobody declared the operator
    register_fake("torchvision::qnms")(lambda *a: None)
"""


@pytest.mark.parametrize("library", [None, b"not a library"])
def test_operators_are_declared_where_torchvision_cannot_load_its_own(library, tmp_path: Path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(FAKE.replace("COMPILED", "False")))
    if library is not None:
        (package / "_C.so").write_bytes(library)
    code = """
        import sys
        sys.path.insert(0, ".")
        IMPORT
        import torchvision, torch
        print(torchvision.__file__, torch.ops.torchvision.nms.default._schema)
    """
    assert "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in run(code.replace("IMPORT", "import iared2"), cwd=tmp_path)
    bare = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code.replace("IMPORT", ""))], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "does not exist" in bare.stderr  # without the hook this torchvision cannot be imported


def test_importing_torchvision_first_leaves_no_hook():
    code = """
        import sys, types
        sys.modules["torchvision"] = types.ModuleType("torchvision")
        import iared2
        print([type(finder).__name__ for finder in sys.meta_path if "Torchvision" in type(finder).__name__])
    """
    assert run(code).strip() == "[]"
