"""Imports go down the house, never up: the layers contract in pyproject.toml, as a test."""

from pathlib import Path

from importlinter import cli

ROOT = Path(__file__).parent.parent


def test_imports_go_down_the_house(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out
