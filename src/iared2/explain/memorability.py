"""Memorability maps (the paper's MemNet, its reference 29): a small CNN that scores a crop, evaluated fully convolutionally.

Its weights cannot be had in a form that loads here, so a file has to be given; without one there is no map, only a message.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iared2.errors import ConfigError, DataError

MISSING = "memorability: MemNet's weights are not public in a form that loads here; give yours as memorability:FILE.safetensors"


class MemNet(nn.Module):
    """AlexNet's layers with one output, its linear layers written as convolutions so that larger images give a map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.LocalResponseNorm(5),
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.LocalResponseNorm(5),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.score = nn.Sequential(nn.Conv2d(256, 4096, 6), nn.ReLU(), nn.Conv2d(4096, 4096, 1), nn.ReLU(), nn.Conv2d(4096, 1, 1))

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w"]:
        """A score for every crop of 227 pixels, 32 pixels apart."""
        return self.score(self.features(images))[:, 0]


def load_memnet(path: str | Path) -> MemNet:
    """MemNet with weights from a safetensors file of this module's names.

    Raises:
        ConfigError: no file is named.
        DataError: it cannot be read, or holds other tensors.
    """
    if not str(path):
        raise ConfigError(MISSING)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        net = MemNet()
    try:
        net.load_state_dict(load_file(path), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"memorability: {path} does not hold MemNet's weights: {str(error).splitlines()[0]}") from None
    return net.eval()


@torch.inference_mode()
def memorability(net: MemNet, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w"]:
    """The map of images, enlarged so that there are seven crops a side."""
    side = 227 + 6 * 32
    return net(nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False))
