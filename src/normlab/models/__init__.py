"""Networks: torchvision's, or the user's own, with the sites rewritten by a variant."""

from normlab.models.build import base, build, start

__all__ = ["base", "build", "start"]
