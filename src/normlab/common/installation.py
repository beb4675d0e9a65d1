"""The folder of the configuration and the names of the commands, in a checkout and where a wheel is installed.

The wheel holds the repository's conf/ as normlab/conf (pyproject.toml); a checkout, installed editable or not, has it
beside src/.
"""

import shlex
import sys
from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"


def command_name(name: str) -> str:
    """Return the command `name`, train or report, as the user types it: normlab-train, or python train.py."""
    installed = CONF == _PACKAGED or Path(sys.argv[0]).name.startswith("normlab-")
    return f"normlab-{name}" if installed else f"python {name}.py"


def study_words(study: str, output_dir: str | Path) -> str:
    """Return the settings by which a command finds a study, as the user types them; without a default output_dir."""
    words = [f"study={study}", *([f"output_dir={output_dir}"] if str(output_dir) != "outputs" else [])]
    return shlex.join(words)
