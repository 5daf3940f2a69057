"""What torch.compile needs to know about packs whose length depends on the data.

How many tokens survive a reduction is known only when it has run. TorchDynamo can trace through that with a
symbol for the unknown size, but unless asked to it ends its graph there, and then compiles anew for other
lengths. `ReducedTransformer.forward` asks for it, so that plain `torch.compile(model)` makes one graph for all
lengths, and leaves the setting of the rest of the program alone. (`torch.compile(..., fullgraph=True)` of a
function that calls the model fails, since `forward` itself is not traced; call `model.logits` there instead:
under `fullgraph` PyTorch captures unknown sizes anyway.)
"""

from contextlib import AbstractContextManager
from typing import Any

import torch.compiler.config


def capture_ragged() -> AbstractContextManager[Any]:
    """While active, what torch.compile traces may contain sizes that depend on data."""
    return torch.compiler.config.patch(capture_dynamic_output_shape_ops=True)
