"""Settings of straight-through Gumbel, apart from the task, because recipes are read without it."""

from pydantic import Field

from iared2.settings import Settings


class GumbelSettings(Settings):
    """How an interpreter is trained with `interpreter_method="gumbel"` (appendix D, which names no numbers)."""

    temperature: float = Field(1.0, gt=0, description="of the relaxed decision; lower is nearer to the hard one, with a noisier gradient")
    kept_weight: float = Field(1.0, ge=0, description="what keeping all patches costs, in nats of cross-entropy")
