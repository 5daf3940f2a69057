"""Training a dense ViT from scratch, by labels and, if given, by a teacher's logits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iared2.train.trainer import Batches, Task


class DenseTask(Task):
    """Cross-entropy with label smoothing, mixed with a Kullback-Leibler term to a teacher (Hinton et al. 2015).

    Loss = (1 - w) CE(labels) + w T^2 KL(teacher / T || model / T).

    Args:
        model: a classifier; its `patch_drop` (timm's PatchDropout), if it has one, is set per epoch.
        smoothing: label smoothing.
        weight, temperature: w and T above; w is ignored when batches carry no `targets`.
        patch_drop: share of patches dropped at random in each epoch; the last value holds for later ones.
    """

    def __init__(self, model: Any, smoothing: float, weight: float, temperature: float, patch_drop: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.smoothing, self.weight, self.temperature = smoothing, weight, temperature
        self.patch_drop = patch_drop

    def begin(self) -> None:
        self.model.requires_grad_(True)
        self.model.train()

    def begin_epoch(self, epoch: int) -> None:
        share = self.patch_drop[min(epoch, len(self.patch_drop) - 1)] if self.patch_drop else 0.0
        if hasattr(self.model.patch_drop, "prob"):
            self.model.patch_drop.prob = share

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(batch["images"]).float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)
        logs = {"cross_entropy": loss.detach(), "accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}
        if "targets" in batch:
            t = self.temperature
            teacher = (batch["targets"] / t).log_softmax(1)
            divergence = F.kl_div((logits / t).log_softmax(1), teacher, reduction="batchmean", log_target=True) * t * t
            loss = (1 - self.weight) * loss + self.weight * divergence
            logs["teacher_kl"] = divergence.detach()
        return {"loss": loss, **logs}


@torch.inference_mode()
def held_out_accuracy(model: nn.Module, batches: Batches, device: torch.device) -> dict[str, float]:
    """Top-1 in percent over evaluation batches."""
    model.eval()
    right = count = 0
    for batch in batches.epoch(0):
        right += int((model(batch["images"].to(device)).argmax(1).cpu() == batch["labels"]).sum())
        count += len(batch["labels"])
    return {"top1": 100 * right / count}
