"""Golden tensors: an embedded model carries an input and its own answers, and proves itself with them.

`golden.safetensors` holds `images` (B x 3 x h x w; fp16, or int8 in steps of `STEP` for large ones), `scores` (G, B, N),
`kept` (B, G) and `logits` (B, classes).
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from iared2.errors import WeightsError
from iared2.model import ReducedTransformer
from iared2.saving import read_tensors

FILE = "golden.safetensors"
LARGE = 128  # pixels per side
STEP = 1.5 / 127  # between two values of an image in int8
TOLERANCE = 1e-3  # scores and logits in fp32; kernels of other machines round differently


def golden_images(size: tuple[int, int], count: int = 2) -> Float[Tensor, "B 3 h w"]:
    """Smooth coloured waves: the same on every machine, and far from uniform."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    waves = [torch.sin(3 * (i + 1) * rows + c) * torch.cos(2 * (i + 2) * columns - c) for i in range(count) for c in range(3)]
    return 1.5 * torch.stack(waves).view(count, 3, *size)


@torch.inference_mode()
def answers(model: ReducedTransformer, images: Float[Tensor, "B 3 h w"]) -> dict[str, Tensor]:
    """What golden tensors record for these images."""
    logits, trace = model.eval().trace(images)
    return {"logits": logits, "scores": trace.score_GBN.contiguous(), "kept": trace.keep_GBN.sum(-1).T.contiguous()}


def write_golden(model: ReducedTransformer, folder: Path, size: tuple[int, int]) -> None:
    """Records golden tensors beside a saved model."""
    # The answers are those for the rounded numbers. One image in bytes is enough where two would be half a megabyte.
    large = max(size) > LARGE
    images = (golden_images(size, 1) / STEP).round().to(torch.int8) if large else golden_images(size).half()
    save_file({"images": images, **answers(model, _exact(images))}, folder / FILE)
    (folder / FILE).chmod(0o644)  # safetensors makes files that only their owner can read


def _exact(images: Tensor) -> Float[Tensor, "B 3 h w"]:
    return images.float() * (STEP if images.dtype == torch.int8 else 1.0)


def check_golden(model: ReducedTransformer, folder: Path) -> float:
    """Compares a loaded model with its golden tensors.

    Returns:
        The largest deviation of scores and logits.

    Raises:
        WeightsError: no golden tensors, or answers that differ.
    """
    golden = read_tensors(folder / FILE)
    found = answers(model, _exact(golden["images"]))
    worst = max(float((found[name] - golden[name]).abs().max()) for name in ("scores", "logits"))
    if worst > TOLERANCE or not torch.equal(found["kept"], golden["kept"]):
        raise WeightsError(
            f"{folder}: answers differ from the golden ones by {worst:.2g} (at most {TOLERANCE}); the files do not belong together"
        )
    return worst
