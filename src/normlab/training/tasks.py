"""The tasks of a run: the loss of a batch, and the metrics of a whole part of the data.

Losses and numbers of correct classifications of shares of a batch, or of batches of an evaluation, add up.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class Classification:
    """Cross-entropy of logits (B, classes) and labels int64 (B,). Metrics are means over images."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a training batch: the mean cross-entropy, a scalar."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def share(self, loss: Tensor, images: int, batch_images: int) -> Tensor:
        """Return the part that `images` of a batch have in its mean, from their own."""
        return loss if images == batch_images else loss * (images / batch_images)

    def test_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of an evaluated batch: the sum over its images, without label smoothing."""
        return F.cross_entropy(outputs.float(), targets, reduction="sum")

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the number of images classified correctly; int64."""
        return self.hits(outputs, targets).sum()

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return whether each image is classified correctly; bool (B,)."""
        return outputs.argmax(1) == targets

    def train_loss(self, losses: Tensor, images: Tensor) -> float:
        """Return the sum over the images of an epoch, from each batch's loss and number of images."""
        return float((losses.double() * images).sum())

    def metrics(self, part: str, loss: float, correct: int, images: int) -> dict[str, float]:
        """Return the means over the images of a part of the data, from sums."""
        return {f"{part}_loss": loss / images, f"{part}_accuracy": correct / images}


class Regression:
    """Squared error of outputs and targets, float32 (B, features), summed over samples and features; no accuracy.

    Santurkar et al. 2018 do not say whether it is a sum or a mean over samples: [A]. A mean would start at about
    features², 100, and their figure ends between 100 and 1,700.
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the squared error."""
        return (outputs.float() - targets).square().sum()

    test_loss = loss

    def share(self, loss: Tensor, images: int, batch_images: int) -> Tensor:
        """Return the loss: it is a sum."""
        return loss

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros((), dtype=torch.int64, device=targets.device)

    def train_loss(self, losses: Tensor, images: Tensor) -> float:
        """Return the sum over batches."""
        return float(losses.double().sum())

    def metrics(self, part: str, loss: float, correct: int, images: int) -> dict[str, float]:
        """Return the sum of the squared error."""
        return {f"{part}_loss": loss}


Task = Classification | Regression


def task_of(kind: Literal["classification", "regression"], label_smoothing: float) -> Task:
    """Return the task of that kind."""
    return Regression() if kind == "regression" else Classification(label_smoothing)
