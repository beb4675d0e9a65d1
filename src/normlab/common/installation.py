"""Where the configuration is and what the commands are called: in a checkout, and where a wheel is installed.

The wheel holds the repository's conf/ as normlab/conf (setup.py); a checkout, installed editable or not, has it once.
"""

import sys
from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"


def called(name: str) -> str:
    """The command `name`, train or report, as the user types it: normlab-train, or python train.py in a checkout."""
    installed = CONF == _PACKAGED or Path(sys.argv[0]).name.startswith("normlab-")
    return f"normlab-{name}" if installed else f"python {name}.py"
