"""`iared2 reproduce`: makes a table, run by run, and writes what is there after each."""

import logging
from dataclasses import replace

from rich.console import Console

from iared2.errors import ConfigError
from iared2.reproduce.bench import Bench
from iared2.reproduce.runs import figures
from iared2.reproduce.tables import DENSE, NAMES, TABLES
from iared2.reproduce.variance import run_variance
from iared2.reproduce.write import Results, write_table
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
        run_variance(bench)
    else:
        table = TABLES[name]()
        dense = figures(bench, replace(DENSE, base=table.lines[0].what.base), 0)
        results: Results = [(line.paper, []) for line in table.lines]
        for seed in range(bench.seeds):
            for line, (_, found) in zip(table.lines, results, strict=True):
                found.append(figures(bench, line.what, seed))
                write_table(name, table, dense, results, bench)
    Console().print((bench.output / f"{name}.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    return 0
