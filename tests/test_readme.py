"""The README's Python blocks run, in order and without a network, and print what the text block below them says."""

import doctest
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from iared2 import assets

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
MISSING = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


@dataclass(frozen=True)
class Block:
    """One Python block: its code, what it prints (None if that is not said), and modules it cannot do without."""

    line: int
    code: str
    output: str | None
    needs: tuple[str, ...]


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text()
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["output"], tuple((found["needs"] or "").split()))
        for found in FENCE.finditer(text)
    ]


def test_first_screen_is_one_screen():
    lines = (ROOT / "README.md").read_text().split("<!-- results:end -->")[0].splitlines()
    assert len(lines) <= 40


def test_links_lead_somewhere():
    for target in MISSING.findall((ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_blocks_run_and_print_what_they_say(monkeypatch, tmp_path, capsys):
    if assets.find(assets.DEFAULT) is None:
        pytest.skip(f"{assets.DEFAULT} is not in the package yet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    checker, names = doctest.OutputChecker(), {"torch": torch}
    for block in blocks():
        if not all(importlib.util.find_spec(name) for name in block.needs):
            continue
        exec(compile("\n" * (block.line - 1) + block.code, "README.md", "exec"), names)  # noqa: S102 - it is our own README
        printed = capsys.readouterr().out
        if block.output is not None:
            flags = doctest.ELLIPSIS
            assert checker.check_output(block.output, printed, flags), f"line {block.line}: got\n{printed}"
