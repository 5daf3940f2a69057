"""What torch.compile needs to be told about packs, whose length depends on the data.

How many tokens survive a reduction is known only when it has run. TorchDynamo can trace through that with a
symbol for the unknown size; unless asked to, it ends its graph there and compiles anew for other lengths.
`captures_sizes` makes a method ask, so that plain `torch.compile(model)` gives one graph for all lengths, and
the setting of the rest of the program is left alone.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo import config as dynamo_config
from torch._dynamo.decorators import skip

P = ParamSpec("P")
R = TypeVar("R")


def captures_sizes(method: Callable[P, R]) -> Callable[P, R]:
    """torch.compile does not trace this method itself, but what it calls, and there keeps sizes that depend on data.

    (`torch.compiler.disable(recursive=False)` says the same to torch.compile, but makes torch.export fail.)
    """

    @functools.wraps(method)
    def outside_of_the_graph(*args: P.args, **kwargs: P.kwargs) -> R:
        with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
            return method(*args, **kwargs)

    return skip(outside_of_the_graph)


def between_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """torch.compile runs this method as it is and compiles what it calls: for choices that depend on values, which no graph holds."""
    return captures_sizes(skip(method))
