"""timm's surface: features on the full grid, classifier and data configuration, as the backbone itself offers them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.errors import ConfigError
from iared2.tokens.packed import PackedTokens, to_grid
from iared2.walk import Walker


class TimmSurface(Walker):
    """What code written for timm's `VisionTransformer` calls. Each place of the grid is filled by its carrier."""

    def forward_features(self, images: Float[Tensor, "B C height width"]) -> Float[Tensor, "B S D"]:
        """Normed features on the full grid: prefix tokens, then each place filled by its carrier (zero if gone)."""
        return self._normed(self.walk(self.start(images), self.adapter.depth).tokens)

    def forward_intermediates(  # noqa: PLR0913, PLR0917 - timm's signature
        self,
        images: Float[Tensor, "B C height width"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """As timm's: features after chosen blocks (the last n, or by number; all by default), on the full grid.

        Args:
            stop_early: run no block behind the last one asked for; the final features are then those after it.

        Raises:
            ConfigError: a block that does not exist, or an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt: got {output_fmt!r}, wanted 'NCHW' or 'NLC'")
        chosen = _blocks(indices, self.adapter.depth)
        state, prefixes, patches = self.start(images), [], []
        for block in range(max(chosen) + 1 if stop_early else self.adapter.depth):
            state = self.walk(state, block + 1)
            if block in chosen:
                prefix_BLD, patch_BND = to_grid(state.tokens)
                if norm:
                    alive_BN1 = (state.tokens.carrier_BN >= 0)[..., None]
                    prefix_BLD, patch_BND = self.adapter.norm(prefix_BLD), self.adapter.norm(patch_BND) * alive_BN1
                if output_fmt == "NCHW":
                    patch_BND = patch_BND.transpose(1, 2).unflatten(2, state.tokens.layout.grid)
                prefixes.append(prefix_BLD)
                patches.append(patch_BND)
        with_prefix = return_prefix_tokens and self.adapter.prefix > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            found |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return found if intermediates_only else found | {"image_features": self._normed(state.tokens)}
        intermediates = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self._normed(state.tokens), intermediates)

    def _normed(self, tokens: PackedTokens) -> Float[Tensor, "B S D"]:
        return self.adapter.norm(torch.cat(to_grid(tokens), dim=1)) * _alive(tokens)

    def forward_head(self, features: Float[Tensor, "B S D"], pre_logits: bool = False) -> Tensor:
        """The backbone's head on features as `forward_features` gives them.

        Where dropped tokens were discarded, their places hold zeros, and a head that pools averages those in: then the answer differs
        a little from the model's own, which pools what is left. It is the same for a class token, or where tokens were merged. Features are
        those of one pass, so it knows nothing of a second look.
        """
        return self.backbone.forward_head(features, pre_logits=pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the backbone's classifier. Margins are each classifier's own, so that there is no second look after it."""
        self.backbone.reset_classifier(num_classes, global_pool)
        self.config = self.config.model_copy(update={"second_look": 0.0})
        for group, reducer in enumerate(self.reducers):  # another pooling may need a patch where none was needed
            reducer.rule = self.config.keep_rule(group, self.adapter.needs_patch)

    @property
    def num_features(self) -> int:
        """Width of the features before the classifier."""
        return self.backbone.num_features

    @property
    def num_classes(self) -> int:
        """Classes of the classifier, 0 if there is none."""
        return self.backbone.num_classes

    @property
    def names_classes(self) -> bool:
        """Whether an answer is one row of two or more logits per image."""
        return names_classes(self.backbone)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's data configuration, so that `timm.data.resolve_model_data_config(model)` works."""
        return self.backbone.pretrained_cfg


def names_classes(backbone: Any) -> bool:
    """Whether a backbone answers with one row of two or more logits per image."""
    return getattr(backbone, "num_classes", 0) > 1 and getattr(backbone, "global_pool", None) != ""


def _alive(tokens: PackedTokens) -> Float[Tensor, "B S 1"]:
    """One where a feature stands, zero where the patch is gone: a norm would turn zeros into its bias."""
    alive_BN = (tokens.carrier_BN >= 0).to(tokens.x_TD.dtype)
    return torch.nn.functional.pad(alive_BN, (tokens.layout.prefix, 0), value=1.0)[..., None]


def _blocks(indices: int | Sequence[int] | None, depth: int) -> Sequence[int]:
    last = depth if indices is None else indices
    chosen = range(depth - last, depth) if isinstance(last, int) else [i + depth if i < 0 else i for i in last]
    if not chosen or min(chosen) < 0 or max(chosen) >= depth:
        raise ConfigError(f"indices: got {indices}, wanted blocks of 0 to {depth - 1}, or how many of the last")
    return chosen
