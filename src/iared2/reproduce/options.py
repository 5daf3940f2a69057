"""Which options each table and figure takes. What one does not take is refused, rather than ignored."""

from collections.abc import Collection

from iared2.errors import ConfigError
from iared2.reproduce.tables import NAMES as TRAINED
from iared2.settings import unknown_key

_TRAINED = ("data", "scale", "seeds", "images", "val-images")
_MODEL = ("model", "weights")
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TRAINED, _TRAINED),
    "table1": ("data", *_MODEL, "models", "memnet", "limit", "slow-limit"),
    "table5": ("data", "photos", *_MODEL, "models", "limit"),
    "figure3": ("photos", *_MODEL, "memnet", "count"),
    "figure6": ("photos", *_MODEL, "memnet", "count"),
    "figure4": ("photos", "data", *_MODEL, "models", "count", "limit"),
    "figure7": ("photos", "data", *_MODEL, "models", "count", "limit"),
}
# One of each group must be given.
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(TRAINED, (("data",),)),
    "table1": (("data",),),
    "table5": (("data", "photos"),),
    "figure3": (("photos",),),
    "figure6": (("photos",),),
    "figure4": (("photos", "data"),),
    "figure7": (("photos", "data"),),
}
_WHAT = {"data": "the folder of pictures", "photos": "a folder of photos"}


def check_options(name: str, given: Collection[str]) -> None:
    """Refuses a table that does not exist, options that it does not take, and the lack of one that it needs.

    Args:
        given: options on the command line, without their dashes.

    Raises:
        ConfigError: in one line, with what the table does take.
    """
    if name not in TAKES:
        raise ConfigError(unknown_key(name, list(TAKES)).replace("setting", "table"))
    strange = [f"--{option}" for option in given if option not in TAKES[name]]
    if strange:
        raise ConfigError(f"{strange[0]}: {name} does not take it; it takes {', '.join(f'--{option}' for option in TAKES[name])}")
    for needed in NEEDS[name]:
        if not set(needed) & set(given):
            words = " or ".join(f"--{option} ({_WHAT[option]})" for option in needed)
            raise ConfigError(f"{name}: nothing to work on; give {words}")
    if "model" in given and "models" in given:
        raise ConfigError(
            "--models: got it beside --model; give one of the two (--models RUN0 RUN1 ... are seeds of the same interpreters)"
        )
