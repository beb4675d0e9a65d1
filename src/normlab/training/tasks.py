"""The tasks of a run: the loss of a batch, and the metrics of a whole part of the data.

Losses and numbers of correct classifications of shares of a batch, or of batches of an evaluation, add up.
"""

import math
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


class SeenClasses(Classification):
    """Classification among the classes that have come so far, whose others have logits of -inf.

    So it is a classifier that grows, up to the start of its new rows, with tensors of one size. Evaluations sum over
    the images of classes that have come.

    Args:
        classes: the number of all.
        device: of the outputs.

    Attributes:
        seen: whether each class has come; bool (classes,), changed in place.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        super().__init__(label_smoothing=0.0)
        self.seen = torch.ones(classes, dtype=torch.bool, device=device)

    def _among_seen(self, outputs: Tensor) -> Tensor:
        return outputs.masked_fill(~self.seen, -math.inf)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Classification`."""
        return super().loss(self._among_seen(outputs), targets)

    def test_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Classification`."""
        losses = F.cross_entropy(self._among_seen(outputs).float(), targets, reduction="none")
        return torch.where(self.seen.index_select(0, targets), losses, 0.0).sum()

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Classification`."""
        return super().hits(self._among_seen(outputs), targets) & self.seen.index_select(0, targets)


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
