"""Held-out figures while a reduced model is trained: quick, on few pictures. `iared2 eval` gives the real ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from iared2.model import ReducedTransformer
from iared2.train.trainer import Batches
from iared2.walk import State


@torch.inference_mode()
def held_out(model: ReducedTransformer, batches: Batches, groups: int, device: torch.device) -> dict[str, float]:
    """Top-1 and agreement with dense in percent, KL to dense in nats, keep ratios and the share of MACs, with the first `groups` active.

    Without a classifier: the cosine to the dense embedding, in place of the first three.
    """
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches.epoch(0):
        images, labels = batch["images"].to(device), batch["labels"].to(device)
        dense = _logits(model, images, 0)[0].float()
        logits, state = _logits(model, images, groups)
        row = _figures(logits.float(), dense, labels) if model.num_classes else {"cosine": F.cosine_similarity(logits, dense, dim=1).sum()}
        for group, reduction in enumerate(state.reductions):
            row[f"keep_ratio_{group + 1}"] = reduction.kept_B.sum() / reduction.before.places
        if len(state.reductions) == len(model.reducers):
            trace = model.make_trace(state.reductions, (images.shape[-2], images.shape[-1]))
            row["macs_share"] = torch.tensor(trace.share_of_dense() * len(labels))
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += len(labels)
    return {name: value / count for name, value in sums.items()}


def _figures(logits: Tensor, dense: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums over the batch of what a classifier's answers can be compared by."""
    found, wanted, goal = logits.argmax(1), dense.argmax(1), dense.log_softmax(1)
    return {
        "top1": 100 * (found == labels).float().sum(),
        "dense_top1": 100 * (wanted == labels).float().sum(),
        "agreement": 100 * (found == wanted).float().sum(),
        "kl": F.kl_div(logits.log_softmax(1), goal, reduction="sum", log_target=True),
    }


def _logits(model: ReducedTransformer, images: Tensor, groups: int) -> tuple[Tensor, State]:
    state = model.finish(model.start(images), reduce=range(groups))
    return model.adapter.head(state.tokens), state
