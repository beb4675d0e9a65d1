"""On a CPU, engine=graph is carried out by a `Tape`."""

from collections.abc import Iterator

import pytest
from training.tape import Tape

from normlab.training import graphs


@pytest.fixture(autouse=True)
def _tape() -> Iterator[None]:
    graphs.GRAPHS["cpu"] = Tape
    graphs.Replayed.checked.clear()
    yield
    graphs.GRAPHS.pop("cpu", None)
