"""Orders of images that make batches: of sampler=paired, and of an evaluation by the statistics of its batches."""

import torch
from torch import Tensor

from normlab.data.splits import shuffled_by_class


def paired(labels: Tensor, count: int, each: int, generator: torch.Generator) -> Tensor:
    """Draw `each` images of every drawn label, `count` in all, side by side (Ioffe 2017, section 4.3).

    Labels are drawn from `labels` (int64, (N,)) with replacement, uniformly over those that occur.
    [A] The images of one drawn label are distinct and in random order, unless the class has fewer than `each`:
    then they are drawn with replacement, too. A label that is drawn again draws its images anew.

    Returns:
        int64 (count,) positions, of which j·each ... j·each + each - 1 have one label; `each` divides `count`.
    """
    classes, sizes = torch.unique(labels, return_counts=True)
    drawn = torch.randint(len(classes), (count // each,), generator=generator)
    size = sizes[drawn]
    enough = size >= each
    left = torch.where(enough[:, None], size[:, None] - torch.arange(each), size[:, None])
    picks = torch.randint(2**62, left.shape, generator=generator) % left  # uniform to within 2^-40
    for i in range(1, each):  # the k-th of the images that are left is the k-th of all that skips those picked
        for taken in picks[:, :i].sort(1).values.unbind(1):
            picks[:, i] += enough & (picks[:, i] >= taken)
    first = sizes.cumsum(0) - sizes  # of each class, among the positions sorted by class
    return labels.argsort(stable=True)[first[drawn, None] + picks].flatten()


def evaluation_order(labels: Tensor, each: int | None, generator: torch.Generator) -> Tensor:
    """Return every position of `labels` (int64, (N,)) once, so that batches of them are like those of training.

    That is in random order; with `each`, in groups of so many images of one label, the groups shuffled, and
    what is left over of the classes at the end. (Files lie sorted by class: batches of one class each would
    have statistics of their own.)
    """
    if each is None:
        return torch.randperm(len(labels), generator=generator)
    members = shuffled_by_class(labels, generator)
    groups = torch.cat([m[: len(m) // each * each].view(-1, each) for m in members])
    rest = torch.cat([m[len(m) // each * each :] for m in members])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    return torch.cat([groups.flatten(), rest[torch.randperm(len(rest), generator=generator)]])
