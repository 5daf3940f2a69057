"""Which options each table and figure takes. What one does not take is refused, rather than ignored."""

from collections.abc import Mapping

from iared2.errors import ConfigError
from iared2.reproduce.tables import NAMES as TRAINED
from iared2.settings import unknown_key

_TRAINED = ("data", "scale", "seeds", "images", "val-images", "weights")
_MODEL = ("model", "weights")
_RUN = ("seed", "dtype", "batch-size")
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TRAINED, _TRAINED),
    "table1": ("data", *_MODEL, "models", "memnet", "limit", "slow-limit", *_RUN),
    "table5": ("data", "photos", *_MODEL, "models", "limit", *_RUN),
    "figure3": ("photos", *_MODEL, "memnet", "count", *_RUN),
    "figure6": ("photos", *_MODEL, "memnet", "count", *_RUN),
    "figure4": ("photos", "data", *_MODEL, "models", "count", "limit", *_RUN),
    "figure7": ("photos", "data", *_MODEL, "models", "count", "limit", *_RUN),
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
_SEVERAL = {"data": "folders", "photos": "photos or folders", "models": "models"}


def check_options(name: str, given: Mapping[str, object]) -> None:
    """Refuses a table that does not exist, options that it does not take or that name nothing, and the lack of one that it needs.

    Args:
        given: options on the command line, without their dashes, and their values.

    Raises:
        ConfigError: in one line, with what the table does take.
    """
    if name not in TAKES:
        raise ConfigError(unknown_key(name, list(TAKES)).replace("setting", "table"))
    strange = [f"--{option}" for option in given if option not in TAKES[name]]
    if strange:
        raise ConfigError(f"{strange[0]}: {name} does not take it; it takes {', '.join(f'--{option}' for option in TAKES[name])}")
    for option, what in _SEVERAL.items():
        if option in given and not given[option]:
            raise ConfigError(f"--{option}: got nothing behind it, wanted one or more {what}; name them, or leave it out")
    for needed in NEEDS[name]:
        if not set(needed) & set(given):
            words = " or ".join(f"--{option} ({_WHAT[option]})" for option in needed)
            raise ConfigError(f"{name}: nothing to work on; give {words}")
    if "model" in given and "models" in given:
        raise ConfigError(
            "--models: got it beside --model; give one of the two (--models RUN0 RUN1 ... are seeds of the same interpreters)"
        )
