"""Networks: torchvision's, or the user's own, with the sites rewritten by a variant."""

from normlab.models.build import build, needs_data, start

__all__ = ["build", "needs_data", "start"]
