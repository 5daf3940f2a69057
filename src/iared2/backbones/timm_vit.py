"""Adapter for timm's `VisionTransformer`: DeiT, AugReg, DeiT-III, DINOv2, CLIP and SigLIP towers, and kin."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.layers import DiffAttention, DropPath, PatchDropout
from timm.layers.attention import Attention
from timm.models import vision_transformer as vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from iared2.backbones.base import Attended, BackboneAdapter, BlockCost, drop_path_per_image, register_adapter
from iared2.errors import UnsupportedBackboneError
from iared2.interpreter import QueryKey
from iared2.tokens.attention import attend, attend_prefix, class_logits
from iared2.tokens.packed import PackedTokens, mean_per_image, pack, prefix_alone, to_grid

ATTENTIONS = (Attention, DiffAttention)
BLOCKS = (vit.Block, vit.ResPostBlock, vit.ParallelScalingBlock, vit.DiffParallelScalingBlock, vit.ParallelThingsBlock)
POOLS = ("", "token", "avg", "avgmax", "max", "map", "prr")


class TimmViTAdapter(BackboneAdapter):
    """Runs a timm `VisionTransformer` on packed tokens."""

    @classmethod
    def missing(cls, module: Any) -> str | None:
        if not isinstance(module, vit.VisionTransformer):
            return "not a timm VisionTransformer"
        for name in ("patch_embed", "_pos_embed", "blocks", "norm", "forward_head"):
            if not hasattr(module, name):
                return f"has no {name!r}"
        return None

    def __init__(self, module: Any) -> None:
        for index, block in enumerate(module.blocks):
            if type(block) not in BLOCKS:
                known = ", ".join(kind.__name__ for kind in BLOCKS)
                raise UnsupportedBackboneError(f"block {index} is a {type(block).__name__}; the adapter knows {known}")
            for attention in _attentions(block):
                if type(attention) not in ATTENTIONS:
                    raise UnsupportedBackboneError(
                        f"block {index} has an attention of class {type(attention).__name__}; the adapter knows "
                        + ", ".join(kind.__name__ for kind in ATTENTIONS)
                    )
        if module.global_pool not in POOLS:
            raise UnsupportedBackboneError(f"pooling {module.global_pool!r}; the adapter knows {', '.join(map(repr, POOLS))}")
        self.module = module
        self.prefix = module.num_prefix_tokens
        self.has_class_token = module.cls_token is not None
        self.width = module.embed_dim
        self.depth = len(module.blocks)
        self.heads = _heads(module.blocks[0])
        self._embed_macs: dict[tuple[int, ...], int] = {}
        self.splits = tuple(isinstance(block, (vit.Block, vit.ResPostBlock)) for block in module.blocks)
        plain = all(self.splits) and all(type(block.attn) is Attention for block in module.blocks)
        self.gives_class_logits = self.has_class_token and plain

    @property
    def needs_patch(self) -> bool:  # pooling may change with reset_classifier
        return self.prefix == 0 or (self.module.global_pool != "token" and not self.module.pool_include_prefix)

    @property
    def answering(self) -> int:
        return 2 if hasattr(self.module, "head_dist") else 1  # timm averages the class and the distillation token's answers

    @property
    def reads_prefix_alone(self) -> bool:
        module, last = self.module, self.module.blocks[-1]
        if type(self) is not TimmViTAdapter:  # one that attends or reads otherwise must say itself what its head reads
            return False
        if module.global_pool != "token" or self.prefix == 0 or type(last) not in (vit.Block, vit.ResPostBlock):
            return False
        # Only a plain layer can be taken apart, not one that is wrapped; and who watches a layer of the block wants to see all tokens.
        plain = type(last.attn) is Attention and type(getattr(last.attn, "qkv", None)) is nn.Linear
        return plain and not any(map(_watched, (*last.modules(), module.norm)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.module.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def embed(self, images: Float[Tensor, "B C height width"]) -> PackedTokens:
        module = self.module
        x_BSD = module._pos_embed(module.patch_embed(images))
        origin_BP = None
        if module.training and isinstance(module.patch_drop, PatchDropout) and module.patch_drop.prob > 0:
            x_BSD, origin_BP = _drop_patches(module.patch_drop, x_BSD, self.prefix)
        return pack(module.norm_pre(x_BSD), self.prefix, self.grid(*images.shape[-2:]), origin_BP)

    def attend(self, block: int, tokens: PackedTokens, want_keys: bool = False, want_class: bool = False) -> Attended:
        module, queries = self.module.blocks[block], None
        if isinstance(module, vit.Block):
            delta, keys, queries = _attention(module.attn, module.norm1(tokens.x_TD), tokens)
            delta = _drop_path(module.drop_path1, module.ls1(delta), tokens)
        elif isinstance(module, vit.ResPostBlock):
            delta, keys, queries = _attention(module.attn, tokens.x_TD, tokens)
            delta = _drop_path(module.drop_path1, module.norm1(delta), tokens)
        elif isinstance(module, vit.ParallelThingsBlock):
            delta, keys = _parallel_attentions(module, tokens)
        else:
            delta, keys = _one_step(module, tokens)
        class_TH = None
        if want_class:
            assert queries is not None  # `gives_class_logits` says where it can be asked for
            class_TH = class_logits(queries, keys, tokens.layout)
        # Keys are a view of queries, keys and values together: a copy lets those go.
        return Attended(tokens.with_x(tokens.x_TD + delta), keys.contiguous() if want_keys else None, class_TH)

    def attend_prefix(self, block: int, tokens: PackedTokens) -> PackedTokens:
        module, first = self.module.blocks[block], prefix_alone(tokens)
        if isinstance(module, vit.Block):
            delta = module.ls1(_prefix_attention(module.attn, module.norm1(tokens.x_TD), tokens))
        else:
            delta = module.norm1(_prefix_attention(module.attn, tokens.x_TD, tokens))
        return first.with_x(first.x_TD + _drop_path(module.drop_path1, delta, first))

    def feed(self, block: int, tokens: PackedTokens) -> PackedTokens:
        module: Any = self.module.blocks[block]
        x_TD = tokens.x_TD
        if isinstance(module, vit.Block):
            delta = _drop_path(module.drop_path2, module.ls2(_mlp(module.mlp, module.norm2(x_TD))), tokens)
        elif isinstance(module, vit.ResPostBlock):
            delta = _drop_path(module.drop_path2, module.norm2(_mlp(module.mlp, x_TD)), tokens)
        elif isinstance(module, vit.ParallelThingsBlock):
            branches: Any = module.ffns
            deltas = [_drop_path(ffn.drop_path, ffn.ls(_mlp(ffn.mlp, ffn.norm(x_TD))), tokens) for ffn in branches]
            delta = torch.stack(deltas).sum(0)
        else:
            return tokens  # attention and feed-forward ran side by side in `attend`
        return tokens.with_x(x_TD + delta)

    def read(self, block: int, tokens: PackedTokens, half: bool) -> Float[Tensor, "T D"]:
        module: Any = self.module.blocks[block]
        if not isinstance(module, vit.Block):  # norms come last, or there are several
            return tokens.x_TD
        return (module.norm2 if half else module.norm1)(tokens.x_TD)

    def norm(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.module.norm(x)

    def head(self, tokens: PackedTokens) -> Tensor:
        module, layout = self.module, tokens.layout
        tokens = tokens.with_x(module.norm(tokens.x_TD))
        if module.global_pool == "token":
            return module.forward_head(tokens.x_TD[layout.prefix_row_BL])
        if module.global_pool == "":  # no pooling: one answer per place, zero features where the patch is gone
            return module.forward_head(torch.cat(to_grid(tokens), dim=1))
        if layout.uniform is not None and tokens.mass_T is None:
            return module.forward_head(tokens.x_TD.view(layout.images, layout.uniform, -1))
        pooled_BD = self._pool_ragged(tokens)
        return module.head(module.head_drop(module.fc_norm(pooled_BD)))

    def _pool_ragged(self, tokens: PackedTokens) -> Float[Tensor, "B D"]:
        """Pools the tokens of each image. A merged token counts as often as it has patches, as in the dense model."""
        if self.module.attn_pool is None and self.module.global_pool == "avg":
            return mean_per_image(tokens, include_prefix=self.module.pool_include_prefix)
        return self._pool_one_by_one(tokens)

    @torch.compiler.disable(reason="its shapes are the lengths; the graph ends here and goes on at the classifier")
    def _pool_one_by_one(self, tokens: PackedTokens) -> Float[Tensor, "B D"]:
        """Pools image by image, merged tokens un-merged first."""
        patches = (to_grid(tokens), tokens.carrier_BN) if tokens.mass_T is not None else None
        pooled = []
        for image, (start, stop) in enumerate(zip(tokens.layout.offsets[:-1], tokens.layout.offsets[1:], strict=True)):
            x_SD = tokens.x_TD[start:stop]
            if patches is not None:
                (prefix_BLD, patch_BND), carrier_BN = patches
                x_SD = torch.cat([prefix_BLD[image], patch_BND[image][carrier_BN[image] >= 0]])
            pooled.append(self.module.pool(x_SD[None]))
        return torch.cat(pooled)

    def embed_macs(self, height: int, width: int) -> int:
        key = (height, width, *self.grid(height, width))  # counted once: every trace asks
        if key not in self._embed_macs:
            embed = copy.deepcopy(self.module.patch_embed).to("meta")
            channels = getattr(embed, "in_chans", None) or embed.proj.in_channels
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                embed(torch.empty(1, channels, height, width, device="meta", dtype=next(embed.parameters()).dtype))
            self._embed_macs[key] = counter.get_total_flops() // 2
        return self._embed_macs[key]

    def block_cost(self, block: int) -> BlockCost:
        module = self.module.blocks[block]
        pairs = sum(map(_pair_macs, _attentions(module))) or _pair_macs(module)
        attention: Any = getattr(module, "attn", None)
        seen = 2 * self.width * attention.num_heads * attention.head_dim if type(attention) is Attention else 0
        return BlockCost(_linear_macs(module), pairs, _linear_macs(module.mlp) if self.splits[block] else 0, seen)

    def head_macs(self, tokens: int, places: int) -> int:
        module = self.module
        pool = 0
        if module.attn_pool is not None:
            token_wise = _linear_macs(module.attn_pool.kv) if hasattr(module.attn_pool, "kv") else 0
            once = _linear_macs(module.attn_pool) - token_wise
            pooled = tokens if module.pool_include_prefix else tokens - self.prefix
            queries = getattr(module.attn_pool, "latent_len", pooled)
            pool = pooled * token_wise + once + 2 * queries * pooled * self.width
        heads = [module.head] + ([module.head_dist] if hasattr(module, "head_dist") else [])
        answers = self.prefix + places if module.global_pool == "" else 1  # without pooling every place gets an answer
        return pool + answers * sum(_linear_macs(head) for head in heads)

    def class_attention(self, block: int) -> QueryKey | None:
        module = self.module.blocks[block]
        attention: Any = getattr(module, "attn", None)
        plain = isinstance(module, vit.Block) and type(attention) is Attention and isinstance(module.norm1, nn.LayerNorm)
        if not plain or any(not isinstance(getattr(attention, name), nn.Identity) for name in ("q_norm", "k_norm")):
            return None
        norm, width = module.norm1, self.width
        if norm.weight is None or attention.qkv.out_features != 3 * width:
            return None
        with torch.no_grad():
            weight = attention.qkv.weight * norm.weight
            bias = attention.qkv.weight @ norm.bias + (attention.qkv.bias if attention.qkv.bias is not None else 0.0)
            query, key = (slice(0, width), slice(width, 2 * width))
            return QueryKey(weight[query], bias[query], weight[key], bias[key], attention.num_heads, attention.scale)

    def frozen_parameters(self) -> set[str]:
        stems = ("patch_embed.", "norm_pre.")
        single = ("cls_token", "dist_token", "reg_token", "pos_embed")
        return {n for n, _ in self.module.named_parameters() if n.startswith(stems) or n in single}


def _attentions(block: Any) -> list[Any]:
    if isinstance(block, vit.ParallelThingsBlock):
        return [attention.attn for attention in block.attns]
    return [block.attn] if hasattr(block, "attn") else []


def _heads(block: Any) -> int:
    return next((attention.num_heads for attention in _attentions(block)), getattr(block, "num_heads", 1))


def _mlp(mlp: Any, x_TD: Tensor) -> Tensor:
    """Feed-forward layers are token-wise, but some of timm's expect a batch axis."""
    return mlp(x_TD[None]).squeeze(0)


def _watched(module: Any) -> bool:
    """Whether hooks or a patched forward of this very module see, or change, what runs through it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _drop_path(module: Any, x_TD: Tensor, tokens: PackedTokens) -> Tensor:
    if isinstance(module, DropPath):
        if module.training and module.drop_prob > 0:
            return drop_path_per_image(x_TD, module.drop_prob, tokens.layout, module.scale_by_keep)
        return x_TD
    return module(x_TD)


def _drop_patches(patch_drop: PatchDropout, x_BSD: Tensor, prefix: int) -> tuple[Tensor, Int[Tensor, "B P"]]:
    """timm's patch dropout, asked which places it keeps; they stay in the order of the grid."""
    row_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    row_BS = patch_drop(row_S.expand(len(x_BSD), -1)[..., None]).squeeze(-1).sort(dim=1).values
    return x_BSD.gather(1, row_BS[..., None].expand(-1, -1, x_BSD.shape[2])), row_BS[:, prefix:] - prefix


def _rate(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


def _attention(module: Any, x_TD: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """What attention adds to its tokens, its keys, and its queries where they are plain."""
    if isinstance(module, DiffAttention):
        return (*_diff_attention(module, x_TD, tokens), None)
    gate = module.gate(x_TD).sigmoid() if getattr(module, "gate", None) is not None else None
    q, k, v = module.qkv(x_TD).view(x_TD.shape[0], 3, module.num_heads, module.head_dim).unbind(1)
    q, k = module.q_norm(q), module.k_norm(k)
    out = attend(q, k, v, tokens.layout, tokens.mass_T, _rate(module.attn_drop)).flatten(1)
    out = module.norm(out)
    if gate is not None:
        out = out * gate
    return module.proj_drop(module.proj(out)), k, q


def _prefix_attention(module: Any, x_TD: Tensor, tokens: PackedTokens) -> Tensor:
    """What attention adds to the prefix tokens (B L, D): keys and values of all tokens, everything else for these alone."""
    first_PD, inner = prefix_alone(tokens.with_x(x_TD)).x_TD, module.num_heads * module.head_dim
    weight, bias = module.qkv.weight, module.qkv.bias
    q = F.linear(first_PD, weight[:inner], None if bias is None else bias[:inner])
    k, v = F.linear(x_TD, weight[inner:], None if bias is None else bias[inner:]).view(-1, 2, module.num_heads, module.head_dim).unbind(1)
    q_BLHK = module.q_norm(q.view(tokens.layout.images, tokens.layout.prefix, module.num_heads, module.head_dim))
    out = attend_prefix(q_BLHK, module.k_norm(k), v, tokens.layout, tokens.mass_T, _rate(module.attn_drop)).flatten(0, 1).flatten(1)
    out = module.norm(out)
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(first_PD).sigmoid()
    return module.proj_drop(module.proj(out))


def _differential(module: Any, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens) -> Tensor:
    """Two softmax maps per head and their weighted difference (Ye et al. 2024, "Differential Transformer")."""
    q, k = module.q_norm(q).unflatten(1, (-1, 2)), module.k_norm(k).unflatten(1, (-1, 2))
    rate = module.attn_drop_p if module.training else 0.0
    one, two = (attend(q[:, :, i], k[:, :, i], v, tokens.layout, tokens.mass_T, rate) for i in (0, 1))
    out = one - module._compute_lambda().type_as(q) * two
    return (module.sub_norm(out) * (1 - module.lambda_init)).flatten(1)


def _diff_attention(module: Any, x_TD: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    q, k, v = module.qkv(x_TD).chunk(3, dim=-1)
    q, k = (y.reshape(x_TD.shape[0], 2 * module.num_heads, module.head_dim) for y in (q, k))
    v = v.reshape(x_TD.shape[0], module.num_heads, 2 * module.head_dim)
    out = module.norm(_differential(module, q, k, v, tokens))
    return module.proj_drop(module.proj(out)), module.k_norm(k)


def _parallel_attentions(module: Any, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    deltas, keys = [], []
    for branch in module.attns:
        delta, key, _ = _attention(branch.attn, branch.norm(tokens.x_TD), tokens)
        deltas.append(_drop_path(branch.drop_path, branch.ls(delta), tokens))
        keys.append(key)
    return torch.stack(deltas).sum(0), torch.cat(keys, dim=1)


def _one_step(module: Any, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """Blocks whose attention and feed-forward network share one projection (ViT-22B)."""
    x_mlp, q, k, v = module.in_proj(module.in_norm(tokens.x_TD)).split(module.in_split, dim=-1)
    if module.mlp_bias is not None:
        x_mlp = x_mlp + module.mlp_bias
    if isinstance(module, vit.DiffParallelScalingBlock):
        q, k = (y.reshape(y.shape[0], 2 * module.num_heads, module.head_dim) for y in (q, k))
        v = v.reshape(len(v), module.num_heads, 2 * module.head_dim)
        out, keys = _differential(module, q, k, v, tokens), module.k_norm(k)
    else:
        q, k, v = (y.reshape(y.shape[0], module.num_heads, module.head_dim) for y in (q, k, v))
        q, keys = module.q_norm(q), module.k_norm(k)
        out = attend(q, keys, v, tokens.layout, tokens.mass_T, _rate(module.attn_drop)).flatten(1)
    x_mlp = module.mlp_drop(module.mlp_act(x_mlp))
    if module.out_proj is not None:
        y = module.out_proj(torch.cat((out, x_mlp), dim=-1))
    else:
        y = module.attn_out_proj(out) + module.mlp_out_proj(x_mlp)
    return _drop_path(module.drop_path, module.ls(y), tokens), keys


def _linear_macs(module: Any) -> int:
    """Multiply-adds per token of all linear layers inside a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _pair_macs(module: Any) -> int:
    """Multiply-adds per pair of tokens: q k^T and weights v."""
    width = module.num_heads * module.head_dim
    return 4 * width + 2 * width if hasattr(module, "sub_norm") else 2 * width


register_adapter("timm_vit", TimmViTAdapter)
