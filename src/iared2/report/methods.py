"""Commands that set methods side by side: which methods, how many pictures, and what the screen says at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iared2.errors import ConfigError
from iared2.evaluate.bootstrap import DRAWS
from iared2.evaluate.classify import eval_preprocess
from iared2.evaluate.machine import describe_machine, versions
from iared2.evaluate.shards import MethodRow
from iared2.explain.methods import check_names, method_names
from iared2.model import ReducedTransformer
from iared2.report.screen import complain, screen
from iared2.report.tables import without_name

EVERY = "all"


def choose_methods(text: str) -> list[str]:
    """Names separated by commas, each once; "all" is every method there is.

    Raises:
        ConfigError: no name, or one that does not exist; the message has the nearest one that does.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--methods: got none; wanted names separated by commas, of {', '.join(method_names())}; or {EVERY}")
    return method_names() if EVERY in names else list(check_names(names, "--methods"))


def check_limits(limit: int | None, slow_limit: int) -> None:
    """Refuses numbers of pictures below one.

    Raises:
        ConfigError: there is one.
    """
    for name, value in (("--limit", limit), ("--slow-limit", slow_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: got {value}, wanted 1 or more")


@dataclass(frozen=True)
class Request:
    """What to score, and where to write it.

    Attributes:
        limit: use a fixed random subset of this many pictures.
        json_file: one more place for the JSON file.
        about: what else the JSON file should say.
    """

    data: Path
    methods: Sequence[str]
    output: Path
    limit: int | None = None
    json_file: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)


def facts_of(model: ReducedTransformer, request: Request, settings: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file says beside its rows: the request, the settings, what pictures went through, and the machine."""
    how, device = eval_preprocess(model), next(model.parameters()).device
    return {
        **request.about,
        "data": str(request.data),
        "limit": request.limit,
        "settings": settings,
        "protocol": {"size": list(how.size), "mean": list(how.mean), "std": list(how.std), "bootstrap": DRAWS},
        "versions": versions(),
        "machine": describe_machine(device),
    }


def tell_rows(table: str, where: str, rows: Sequence[MethodRow], skipped: dict[str, str]) -> int:
    """The table on the screen, where the files are, and what went wrong.

    Returns:
        0; 1 where pictures were broken or a method has no figures; 2 where none has.
    """
    screen().print(table, markup=False, soft_wrap=True)
    screen().print(where, markup=False, soft_wrap=True)
    failed = [row for row in rows if row.why is not None]
    for row in failed:
        complain(f"{row.method}: {without_name(row.method, row.why or '')}")
    if skipped:
        complain(f"{len(skipped)} broken pictures were left out: {', '.join(list(skipped)[:5])}{', ...' if len(skipped) > 5 else ''}")
    return 2 if len(failed) == len(rows) else int(bool(failed or skipped))
