"""On a CPU, engine=graph is carried out by a `Tape`."""

from collections.abc import Iterator

import pytest
from training.tape import Tape

from normlab.training import engines


@pytest.fixture(autouse=True)
def _tape() -> Iterator[None]:
    engines.GRAPHS["cpu"] = Tape
    yield
    engines.GRAPHS.pop("cpu", None)
