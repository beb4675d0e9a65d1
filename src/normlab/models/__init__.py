"""Networks: torchvision's, or the user's own, with the sites rewritten by a variant."""

from normlab.models.build import build

__all__ = ["build"]
