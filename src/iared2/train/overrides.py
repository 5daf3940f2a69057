"""Settings from the command line: `section.field=value`, put into a recipe's values."""

import json
from typing import Any

from iared2.errors import ConfigError
from iared2.settings import unknown_key

FREE = (("backbone", "arguments"),)  # sections that take keys of any name: what they are handed on to knows them


def parse_overrides(tokens: list[str]) -> list[tuple[str, Any]]:
    """`--a.b=1`, `--a.b 1` and `a.b=1` -> pairs of path and value; values are JSON where they parse as such."""
    pairs, rest = [], list(tokens)
    while rest:
        token = rest.pop(0)
        path, equals, text = token.removeprefix("--").partition("=")
        if not equals:
            if not token.startswith("--") or not rest:
                raise ConfigError(f"override {token!r}: wanted section.field=value, e.g. --data.batch_size=64")
            text = rest.pop(0)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        pairs.append((path.replace("-", "_"), value))
    return pairs


def put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets `values[path[0]][path[1]]...`, which must exist already unless its section is free.

    Raises:
        ConfigError: there is no such field, or its section is not set in this recipe.
    """
    for depth, part in enumerate(path[:-1]):
        if not isinstance(values.get(part), dict):
            if part not in values and not _free(path[:depth]):
                raise ConfigError(unknown_key(part, list(values)))
            if part in values:
                hint = "; a budget goes with the recipe `budget`" if part == "together" else ""
                raise ConfigError(f"{'.'.join(path)}: {part!r} is {values[part]!r} in this recipe and has no fields to set{hint}")
            values[part] = {}
        values = values[part]
    if path[-1] not in values and not _free(path[:-1]):
        raise ConfigError(unknown_key(path[-1], list(values)))
    values[path[-1]] = value


def _free(section: list[str]) -> bool:
    return any(tuple(section[: len(free)]) == free for free in FREE)
