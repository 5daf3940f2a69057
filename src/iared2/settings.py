"""The base of all typed settings: frozen, validated, and quick to name the right spelling of a wrong key."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from iared2.errors import ConfigError


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and answers them with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_key(str(key), list(cls.model_fields)))
        return data


def unknown_key(key: str, known: list[str]) -> str:
    """The sentence for a key that does not exist."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown setting {key!r}; {hint}"


def explain_validation(error: ValidationError) -> ConfigError:
    """Pydantic's report in one line per problem: where, what was got, what was wanted."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if isinstance(problem.get("input"), dict) else f" (got {problem.get('input')!r})"
        lines.append(f"{where + ': ' if where else ''}{message}{got}")
    return ConfigError("; ".join(lines))
