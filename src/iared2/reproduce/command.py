"""`iared2 reproduce`: makes a table or a figure, run by run, and writes what is there after each."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from iared2.errors import ConfigError
from iared2.reproduce.bench import Bench
from iared2.reproduce.figures import SHEETS, run_figure
from iared2.reproduce.maps import MapsBench
from iared2.reproduce.runs import figures
from iared2.reproduce.table1 import run_table1
from iared2.reproduce.table5 import run_table5
from iared2.reproduce.tables import DENSE, NAMES, TABLES
from iared2.reproduce.variance import run_variance
from iared2.reproduce.write import Results, write_table
from iared2.runtime import is_main
from iared2.settings import unknown_key


def run_reproduction(name: str, bench: Bench) -> int:
    """Makes one table: first every line with seed 0, then with seed 1, and so on. What an earlier call finished is not done again.

    Raises:
        ConfigError: an unknown table, or a scale that cannot be had here.
        DataError: pictures that are not what the scale expects.
    """
    if name not in NAMES:
        raise ConfigError(unknown_key(name, list(NAMES)).replace("setting", "table"))
    bench.check()
    logging.getLogger("iared2.train").setLevel(logging.WARNING)  # one line per finished run is enough
    if name == "variance":
        _refuse_several(name)
        run_variance(bench)
    else:
        table = TABLES[name]()
        dense = figures(bench, replace(DENSE, base=table.lines[0].what.base), 0)
        results: Results = [(line.paper, []) for line in table.lines]
        for seed in range(bench.seeds):
            for line, (_, found) in zip(table.lines, results, strict=True):
                found.append(figures(bench, line.what, seed))
                if is_main():
                    write_table(name, table, dense, results, bench)
    if is_main():
        _tell(bench.output / f"{name}.md")
    return 0


ABOUT_MAPS: dict[str, Callable[[MapsBench], int]] = {
    "table1": run_table1,
    "table5": run_table5,
    **{name: partial(run_figure, name) for name in SHEETS},
}


def run_maps(name: str, bench: MapsBench) -> int:
    """Makes a table or a figure about maps of models that are trained already.

    Returns:
        0; 1 where pictures were broken or a row has no figures.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    _refuse_several(name)
    bench.check()
    code = ABOUT_MAPS[name](bench)
    _tell(bench.output / f"{name}.md")
    return code


def _refuse_several(name: str) -> None:
    """Tables that are trained share the work among processes; the others would do all of it in each."""
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"reproduce {name}: got {count} processes, wanted one; start it without torchrun or accelerate")


def _tell(path: Path) -> None:
    Console().print(path.read_text(), markup=False, highlight=False, soft_wrap=True)
