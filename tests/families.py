"""Tiny random timm vision transformers, one per family: width 32, depth 4, 32x32 pixels, 8x8 patches.

All weights are randomised, layer scales, biases and prefix tokens included: timm's own initial values (zeros,
ones, 1e-6) would hide what an adapter leaves out.
"""

from dataclasses import dataclass, field
from typing import Any

import timm.models.vision_transformer as vit
import torch
from timm.layers import DiffAttention, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from iared2.backbones.mini import iared2_mini_patch8_64

DEPTH, WIDTH, CLASSES = 4, 32, 5


@dataclass(frozen=True)
class Family:
    """How to build one tiny backbone, and the pixels to feed it."""

    options: dict[str, Any] = field(default_factory=dict)
    make: Any = vit.VisionTransformer
    sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    gated: bool = False

    def build(self, seed: int = 0, **more: Any) -> nn.Module:
        """The backbone, in eval mode."""
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "num_classes": CLASSES}
        if self.make is iared2_mini_patch8_64:
            del settings["patch_size"]
        torch.manual_seed(seed)
        model = self.make(**{**settings, **self.options, **more})
        if self.gated:
            for block in model.blocks:
                block.attn.gate = nn.Linear(WIDTH, block.attn.attn_dim)
        return randomised(model).eval()

    def images(self, count: int = 3, which: int = 0, seed: int = 1) -> Tensor:
        """Noise pictures of one of the family's sizes."""
        return torch.randn(count, 3, *self.sizes[which], generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Weights of ordinary size everywhere."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.normal_(0.5, 0.2)
            elif value.dim() == 1 and name.endswith("weight"):
                value.normal_(1.0, 0.3)
            else:
                value.normal_(0.0, 0.25)
    return model


DINO = {
    "reg_tokens": 4,
    "no_embed_class": True,
    "init_values": 1e-5,
    "dynamic_img_size": True,
    "mlp_layer": SwiGLUPacked,
    "mlp_ratio": 5.3334,
}

FAMILIES: dict[str, Family] = {
    "deit": Family(),
    "deit_distilled": Family(make=VisionTransformerDistilled),
    "augreg": Family({"weight_init": "jax", "qkv_bias": False}),
    "deit3": Family({"no_embed_class": True, "init_values": 1e-6}),
    "dinov2_reg": Family({**DINO}, sizes=((32, 32), (40, 24))),
    "clip": Family({"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"}),
    "siglip": Family({"class_token": False, "global_pool": "map"}),
    "map_with_class_token": Family({"global_pool": "map"}),
    "avg": Family({"global_pool": "avg"}),
    "avg_final_norm": Family({"global_pool": "avg", "fc_norm": False, "class_token": False}),
    "avg_with_prefix": Family({"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}),
    "avgmax": Family({"global_pool": "avgmax"}),
    "max": Family({"global_pool": "max", "fc_norm": False}),
    "prr": Family({"global_pool": "prr"}),
    "tokens_out": Family({"global_pool": ""}),
    "non_square": Family({"img_size": (32, 48)}, sizes=((32, 48),)),
    "dynamic": Family({"dynamic_img_size": True}, sizes=((32, 32), (24, 48))),
    "padded": Family({"dynamic_img_size": True, "dynamic_img_pad": True}, sizes=((30, 37),)),
    "no_positions": Family({"pos_embed": "none", "reg_tokens": 1}),
    "qk_norm": Family({"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "gated": Family(gated=True),
    "diff_attention": Family({"attn_layer": DiffAttention}),
    "res_post_norm": Family({"block_fn": vit.ResPostBlock, "init_values": 1e-5}),
    "parallel_scaling": Family({"block_fn": vit.ParallelScalingBlock, "init_values": 1e-5}),
    "diff_parallel": Family({"block_fn": vit.DiffParallelScalingBlock, "qk_norm": True}),
    "parallel_things": Family({"block_fn": vit.ParallelThingsBlock, "init_values": 1e-5}),
    "mini": Family({}, make=iared2_mini_patch8_64, sizes=((32, 32), (40, 48))),
}
