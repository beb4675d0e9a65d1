"""What a run learns: the loss of a batch, and the metrics of a whole part of the data. Chosen once per run."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class Classification:
    """outputs: logits (B, classes); targets: int64 (B,). Metrics are means over images."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of a training batch: its mean cross-entropy."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def share(self, loss: Tensor, images: int, of: int) -> Tensor:
        """What the loss of `images` images is of that of a batch `of` which they are a part: shares add up."""
        return loss if images == of else loss * (images / of)

    def test_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of an evaluated batch: the sum over its images, without label smoothing."""
        return F.cross_entropy(outputs.float(), targets, reduction="sum")

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Images classified correctly; int64."""
        return (outputs.argmax(1) == targets).sum()

    def train_loss(self, losses: Tensor, images: Tensor) -> float:
        """Over an epoch, from each batch's loss and number of images."""
        return float((losses.double() * images).sum())

    def metrics(self, part: str, loss: float, hits: int, images: int) -> dict[str, float]:
        return {f"{part}_loss": loss / images, f"{part}_accuracy": hits / images}


class Regression:
    """outputs and targets: float32 (B, features). The loss is the squared error, summed over samples and features;
    there is no accuracy. (Santurkar et al. 2018 do not say whether it is a sum or a mean over samples: [A]. A mean
    would start at about features², 100, and their figure ends between 100 and 1,700.)
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.float() - targets).square().sum()

    test_loss = loss

    def share(self, loss: Tensor, images: int, of: int) -> Tensor:
        return loss

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=targets.device)

    def train_loss(self, losses: Tensor, images: Tensor) -> float:
        return float(losses.double().sum())

    def metrics(self, part: str, loss: float, hits: int, images: int) -> dict[str, float]:
        return {f"{part}_loss": loss}


Task = Classification | Regression


def task_of(kind: Literal["classification", "regression"], label_smoothing: float) -> Task:
    return Regression() if kind == "regression" else Classification(label_smoothing)
