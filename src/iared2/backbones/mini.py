"""The small plain ViT behind the embedded model, registered with timm for two input sizes.

`iared2_mini_patch8_64` sees 64x64 pixels in 8x8 tokens, `iared2_mini_patch8_96` sees 96x96 in 12x12; both have
the same weights but for the positions, so training starts on the cheap one and ends on the fine one.

A convolutional stem (Xiao et al. 2021, "Early Convolutions Help Transformers See Better") takes the place
of the linear patch embedding: it costs little and lets a ViT learn from 100,000 small pictures. The blocks
are timm's own, so the model is an ordinary `VisionTransformer` to every adapter.
"""

from functools import partial
from typing import Any

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class PatchStem(nn.Module):
    """Three strided 3x3 convolutions: (B, 3, 8h, 8w) pixels -> (B, `channels`, h, w) features.

    One affine-free group normalisation before the last convolution steadies training; it keeps no running
    statistics, so a frozen stem is the same function in train and eval mode.
    """

    def __init__(self, in_chans: int = 3, channels: int = 128) -> None:
        super().__init__()
        quarter, half = channels // 4, channels // 2
        self.conv1 = nn.Conv2d(in_chans, quarter, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(quarter, half, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, half, affine=False)
        self.conv3 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.act = nn.GELU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.conv1(images))
        x = self.act(self.norm(self.conv2(x)))
        return self.act(self.conv3(x))


def _stem_embed(in_chans: int = 3, **kwargs: Any) -> HybridEmbed:
    kwargs["patch_size"] = 1  # the stem itself strides by 8
    return HybridEmbed(PatchStem(in_chans), in_chans=in_chans, **kwargs)


def _cfg(size: int) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "num_classes": 200,
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.backbone.conv1",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"iared2_mini_patch8_64": _cfg(64), "iared2_mini_patch8_96": _cfg(96)})


def _mini(name: str, size: int, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    settings: dict[str, Any] = {
        "img_size": size,
        "patch_size": 8,
        "embed_dim": 160,
        "depth": 12,
        "num_heads": 5,
        "num_classes": 200,
        "dynamic_img_size": True,
        "embed_layer": partial(_stem_embed),
    }
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**settings, **kwargs})


@register_model
def iared2_mini_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Depth 12, width 160, 5 heads, 8x8 tokens from 64x64 pixels; other sizes by interpolated positions."""
    return _mini("iared2_mini_patch8_64", 64, pretrained, kwargs)


@register_model
def iared2_mini_patch8_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The same with 12x12 tokens from 96x96 pixels."""
    return _mini("iared2_mini_patch8_96", 96, pretrained, kwargs)
