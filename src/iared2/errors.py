"""The errors users meet. Each message names what was got, what was wanted, and the way out."""


class IARED2Error(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(IARED2Error, ValueError):
    """A setting that cannot be used: a recipe field, a group layout, an unknown option."""


class UnsupportedBackboneError(IARED2Error, TypeError):
    """No adapter fits this backbone, or one of its blocks."""


class WeightsError(IARED2Error, ValueError):
    """A weights file that is missing, damaged, or of another shape."""


class DataError(IARED2Error, ValueError):
    """A picture, folder or archive that cannot be read as what it should be."""


class HubError(IARED2Error, ConnectionError):
    """A model hub that could not be reached, or a name it does not know."""


class TrainingError(IARED2Error, RuntimeError):
    """A training that cannot go on (a loss that is not finite, a checkpoint of another recipe)."""
