"""One thing that was checked of a study, and how it came out."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """The outcomes of a check.

    Attributes:
        HOLDS: what was checked is as it says.
        OPEN: it could not be checked, or not be decided.
        FAILS: it is not as it says.
    """

    HOLDS = "holds"
    OPEN = "open"
    FAILS = "fails"


@dataclass(frozen=True)
class Check:
    """A check: its outcome, what it was about, and the rest of a sentence that begins with that."""

    outcome: Outcome
    subject: str
    text: str
