"""Which test images a finished run classified correctly at its last evaluation: correct.json.

order     SHA-256 of which images they are, in their order (data/image_order.py)
classes   [name, number of images] of each class; the images are in the order of the classes
correct   a bit per image, 1 where the network was right; eight to a byte, the first one highest, base64

10,000 images are 1,250 bytes, 1,668 in base64; since images are sorted by class, all their labels cost a number per
class. Only equal `order`s are compared.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from normlab.runs import files, reading
from normlab.runs.reading import RecordPath

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CORRECT = "correct.json"


class Correct(NamedTuple):
    """Which images a run got right; `bits` has them by image.

    Attributes:
        order: digest of the images in their order.
        classes: names.
        counts: images of each class.
        packed: the bits, eight to a byte.
    """

    order: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    packed: bytes

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(self.counts)

    @property
    def number(self) -> int:
        """The number of images that are classified correctly."""
        return int.from_bytes(self.packed).bit_count()

    def bits(self) -> "NDArray[np.bool_]":
        """Return whether each image is classified correctly, (images,)."""
        import numpy as np  # slow to import, and most commands need no bits

        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=self.images).astype(bool)


def as_json(order: str, classes: Sequence[str], counts: Iterable[int], packed: bytes) -> bytes:
    """Return the contents of correct.json; classes whose names cannot be shown apart are numbered."""
    names = [reading.shown(name)[:300] for name in classes]
    if len(set(names)) < len(names) or not all(names):
        names = [str(number) for number in range(len(names))]
    found = {
        "order": order,
        "classes": [[*each] for each in zip(names, counts, strict=True)],
        "correct": base64.b64encode(packed).decode(),
    }
    return (files.to_json(found) + "\n").encode()


def parse(path: RecordPath, content: bytes) -> Correct:
    """Return what correct.json holds.

    Raises:
        UserError: if that is none, or its parts do not go together.
    """
    from normlab.runs import schema  # pydantic is slow to import, and most commands read no record

    value = reading.json_object(path, content)
    if why := schema.fault(schema.Correct, value):
        raise reading.damaged(path, why)
    try:
        return _checked(value)
    except (ValueError, binascii.Error) as error:
        raise reading.damaged(path, error) from None


def _checked(value: dict[str, Any]) -> Correct:
    names, counts = zip(*value["classes"], strict=True)
    found = Correct(value["order"], names, counts, base64.b64decode(value["correct"], validate=True))
    if len(set(names)) < len(names):
        raise ValueError("two of its classes have the same name")
    if not found.images:
        raise ValueError("it has no images")
    if len(found.packed) != -(-found.images // 8):
        raise ValueError(f"it has {len(found.packed)} bytes of bits for {found.images} images")
    if found.packed[-1] & (1 << -found.images % 8) - 1:
        raise ValueError("it has bits of more images than there are")
    return found
