"""The reference for everything exact: slow, one image at a time, explicit loops, written from the paper.

Nothing here uses the library's own arithmetic; the backbone's blocks are called whole, with timm's own mask.
Use it in float64.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def score(x_ND: Tensor, policy_D: Tensor, query: nn.Linear, key: nn.Linear, heads: int, *, norm: bool, scale: bool) -> Tensor:
    """Eq. 1, token by token and head by head, with both projections written out."""
    head_width = x_ND.shape[1] // heads

    def normed(x_D: Tensor) -> Tensor:
        return (x_D - x_D.mean()) / (x_D.var(unbiased=False) + 1e-5).sqrt() if norm else x_D

    k_D = key.weight @ policy_D + key.bias
    scores = []
    for x_D in x_ND:
        q_D = query.weight @ normed(x_D) + query.bias
        total = 0.0
        for head in range(heads):
            part = slice(head * head_width, (head + 1) * head_width)
            dot = (q_D[part] * k_D[part]).sum() / (math.sqrt(head_width) if scale else 1.0)
            total = total + 1 / (1 + (-dot).exp())
        scores.append(total / heads)
    return torch.stack(scores)


def reward(correct: bool, kept: int, patches: int, tau: float, power: int) -> float:
    """Eq. 2 for one image."""
    return 1 - (kept / patches) ** power if correct else -tau


def policy_gradient(score_N: Tensor, u: list[int], advantage: float) -> Tensor:
    """Eq. 3 for one draw: A grad_I sum_i log(I_i u_i + (1 - I_i)(1 - u_i)), by hand."""
    return torch.tensor(
        [advantage * (1 / p if kept else -1 / (1 - p)) for p, kept in zip(score_N.tolist(), u, strict=True)], dtype=score_N.dtype
    )


def attention(q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, lengths: list[int], mass_T: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(K)) v per image; a token of mass m counts as m equal tokens."""
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            heads = []
            for h in range(q_THK.shape[1]):
                weights = [(q_THK[t, h] @ k_THK[s, h] / math.sqrt(q_THK.shape[2])).exp() for s in range(start, start + length)]
                if mass_T is not None:
                    weights = [w * m for w, m in zip(weights, mass_T[start : start + length], strict=True)]
                heads.append(sum(w * v_THV[s, h] for w, s in zip(weights, range(start, start + length), strict=True)) / sum(weights))
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def chances(
    score_S: Tensor, mass: list[float], feature_SF: Tensor, weights: tuple[float, float, float], pairs: bool = False
) -> list[float]:
    """What patches of one image are worth: sigmoid(steepness (log share + redundancy log(1 - s) - offset)), pair by pair."""
    redundancy, offset, steepness = weights
    relevance = [float(s) * m for s, m in zip(score_S, mass, strict=True)]
    mean = sum(relevance) / len(relevance)
    ties = nearest_better(relevance, feature_SF)
    if pairs:
        ties = [tie if is_pair(i, ties, relevance) else (-1.0, None) for i, tie in enumerate(ties)]
    found = []
    for i, mine in enumerate(relevance):
        best, _ = ties[i]
        z = math.log(mine / mean) + redundancy * math.log(max(1 - best, 1e-6))
        found.append(1 / (1 + math.exp(-steepness * (z - offset))))
    return found


def is_pair(i: int, ties: list[tuple[float, int | None]], relevance: list[float]) -> bool:
    """Whether no other tie at either end of row i's is as close; of equal ties to the same row the most relevant row's comes first."""
    mine, better = ties[i]
    for k, (other, goal) in enumerate(ties):
        if k == i or goal is None or not {k, goal} & {i, better}:
            continue
        later = goal == better and (relevance[k], -k) < (relevance[i], -i)  # it would have to be closer
        if other > mine or (other == mine and not later):
            return False
    return better is not None


def nearest_better(relevance: list[float], feature_SF: Tensor) -> list[tuple[float, int | None]]:
    """For each row the greatest cosine to a row of more relevance (of equals, an earlier one), and that row."""
    ties: list[tuple[float, int | None]] = []
    for i, mine in enumerate(relevance):
        best: tuple[float, int | None] = (-1.0, None)
        for j, other in sorted(enumerate(relevance), key=lambda pair: -pair[1]):  # of equally close ones the most relevant
            if other > mine or (other == mine and j < i):
                cosine = float(feature_SF[i] @ feature_SF[j] / (feature_SF[i].norm() * feature_SF[j].norm()))
                best = (cosine, j) if cosine > best[0] else best
        ties.append(best)
    return ties


def nearest(feature_SF: Tensor, dropped: list[int], kept: list[int]) -> dict[int, int]:
    """For each dropped row the kept row with the greatest cosine; nothing if none is kept."""
    chosen = {}
    for row in dropped:
        best = -math.inf
        for other in kept:
            cosine = float(feature_SF[row] @ feature_SF[other] / (feature_SF[row].norm() * feature_SF[other].norm()))
            if cosine > best:
                best, chosen[row] = cosine, other
    return chosen


class Image:
    """One image on its way through the masked dense model: all rows stay, dropped ones are masked out as keys."""

    def __init__(self, module: nn.Module, pixels: Tensor) -> None:
        self.module, self.prefix = module, module.num_prefix_tokens
        self.x_SD = module.norm_pre(module._pos_embed(module.patch_embed(pixels[None])))[0]
        rows = len(self.x_SD)
        self.alive = [True] * rows
        self.mass = [1.0] * rows
        self.carrier = list(range(rows))  # -1: gone
        self.keys_SF: Tensor | None = None

    def drop(self, keep: list[bool], how: str) -> None:
        """Drops the patches that are not kept, and hands them over."""
        patches = [s for s in range(self.prefix, len(self.x_SD)) if self.alive[s]]
        kept = [s for s in patches if keep[s - self.prefix]]
        dropped = [s for s in patches if not keep[s - self.prefix]]
        features = self.x_SD if self.keys_SF is None else self.keys_SF
        goal = nearest(features.detach(), dropped, kept) if how == "merge" else {}
        if how == "fuse" and dropped:  # scores are all the same in these tests: the first one is the best
            first, *dropped = dropped
            kept, goal = sorted([*kept, first]), dict.fromkeys(dropped, first)
        rows = list(self.x_SD)
        for k in kept:
            given = [s for s in dropped if goal.get(s) == k]
            if given:
                total = self.mass[k] + sum(self.mass[s] for s in given)
                rows[k] = (rows[k] * self.mass[k] + sum(self.x_SD[s] * self.mass[s] for s in given)) / total
                self.mass[k] = total
        self.x_SD = torch.stack(rows)
        for s in dropped:
            self.alive[s] = False
        self.carrier = [goal.get(c, -1) if c in dropped else c for c in self.carrier]

    def run(self, block: nn.Module) -> None:
        """One whole block of timm's, with -inf for dropped keys and log(mass) for the others."""
        found: list[Tensor] = []
        norms = [m for name, m in block.named_modules() if name.rsplit(".", 1)[-1] == "k_norm"]
        hooks = [m.register_forward_hook(lambda _m, _i, out: found.append(out)) for m in norms]
        bias = [math.log(m) if alive else -math.inf for m, alive in zip(self.mass, self.alive, strict=True)]
        mask = torch.tensor(bias, dtype=self.x_SD.dtype).expand(1, 1, len(bias), len(bias))
        self.x_SD = block(self.x_SD[None], attn_mask=mask)[0]
        for hook in hooks:
            hook.remove()
        rows = len(self.x_SD)  # (S, H, K) in a ParallelScalingBlock, (H, S, K) elsewhere; here S is not a number of heads
        keys = [k[0] if len(k[0]) == rows else k[0].transpose(0, 1) for k in found]
        self.keys_SF = torch.cat([k.flatten(1) for k in keys], dim=1)  # heads concatenated

    def run_with_drop(self, block: nn.Module, keep: list[bool], how: str) -> None:
        """A plain block whose patches are dropped between its two halves, on the keys of its own attention."""
        feed, kept_feed = block.mlp, block.ls2

        class Nothing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.zeros_like(x)

        block.mlp, block.ls2 = Nothing(), nn.Identity()  # the block alone, without its second half
        self.run(block)
        block.mlp, block.ls2 = feed, kept_feed
        self.drop(keep, how)
        self.x_SD = self.x_SD + block.ls2(block.mlp(block.norm2(self.x_SD[None])))[0]

    def logits(self) -> Tensor:
        """The backbone's head on the tokens that are left; a merged patch counts once more in a pool over patches."""
        module, x_SD = self.module, self.module.norm(self.x_SD)
        places = [c for c in self.carrier[self.prefix :] if c >= 0]
        if module.global_pool == "":  # all places: zero where nothing stands
            rows = [x_SD[c] if c >= 0 else torch.zeros_like(x_SD[0]) for c in self.carrier]
            return module.forward_head(torch.stack(rows)[None])[0]
        return module.forward_head(x_SD[[*range(self.prefix), *places]][None])[0]

    def carriers(self) -> list[int]:
        """The place that carries each place, -1 where it is gone."""
        return [c - self.prefix if c >= 0 else -1 for c in self.carrier[self.prefix :]]


def masked_dense(
    module: nn.Module, images: Tensor, plan: Mapping[int, Tensor], how: str, between: bool = False
) -> tuple[Tensor, list[list[int]], list[list[float]]]:
    """The untouched model run on all tokens, dropped ones masked out from their drop on.

    Args:
        plan: at which block which places are kept, (B, N).
        between: the drop comes between the block's two halves, not before it.

    Returns:
        Logits, and each image's final carriers and row masses.
    """
    logits, carriers, masses = [], [], []
    for index, pixels in enumerate(images):
        image = Image(module, pixels)
        for number, block in enumerate(module.blocks):
            keep = plan[number][index].tolist() if number in plan else None
            if keep is not None and between:
                image.run_with_drop(block, keep, how)
                continue
            if keep is not None:
                image.drop(keep, how)
            image.run(block)
        logits.append(image.logits())
        carriers.append(image.carriers())
        masses.append([m for m, alive in zip(image.mass, image.alive, strict=True) if alive])
    return torch.stack(logits), carriers, masses


def rerun_kept(module: nn.Module, pixels: Tensor, plan: Mapping[int, Tensor], index: int) -> Tensor:
    """One image by the untouched blocks, on nothing but the tokens that are left (discard)."""
    x_1SD = module.norm_pre(module._pos_embed(module.patch_embed(pixels[None])))
    place = list(range(x_1SD.shape[1] - module.num_prefix_tokens))
    for number, block in enumerate(module.blocks):
        if number in plan:
            keep = [p for p in place if plan[number][index, p]]
            rows = [*range(module.num_prefix_tokens), *(module.num_prefix_tokens + place.index(p) for p in keep)]
            x_1SD, place = x_1SD[:, rows], keep
        x_1SD = block(x_1SD)
    return module.forward_head(module.norm(x_1SD))[0]
