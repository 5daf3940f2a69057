"""The Python blocks of the README and docs run, in order and without a network, and print what the text block below them says."""

import doctest
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from iared2 import assets
from iared2.backbones import base

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/architecture.md"]
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


@dataclass(frozen=True)
class Block:
    """One Python block: its code, what it prints (None if that is not said), and modules it cannot do without."""

    line: int
    code: str
    output: str | None
    needs: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["output"], tuple((found["needs"] or "").split()))
        for found in FENCE.finditer(text)
    ]


def test_first_screen_is_one_screen():
    lines = (ROOT / "README.md").read_text().split("<!-- results:end -->")[0].splitlines()
    assert len(lines) <= 40


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall((ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.untyped  # one block exports to ONNX
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_and_print_what_they_say(page, monkeypatch, tmp_path, capsys):
    if page == "README.md" and assets.find(assets.DEFAULT) is None:
        pytest.skip(f"{assets.DEFAULT} is not in the package yet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(base, "_ADAPTERS", dict(base.adapters()))  # a page may register one
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    checker, names = doctest.OutputChecker(), {"torch": torch}
    for block in blocks(page):
        if not all(importlib.util.find_spec(name) for name in block.needs):
            continue
        exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)  # noqa: S102 - these are our own pages
        printed = capsys.readouterr().out
        if block.output is not None:
            assert checker.check_output(block.output, printed, doctest.ELLIPSIS), f"{page}, line {block.line}: got\n{printed}"
