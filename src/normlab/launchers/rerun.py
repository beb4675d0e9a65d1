"""Train a recorded run again: `python -m normlab.launchers.rerun order.json`, which `report.py verify` starts.

The order has the settings, of which output_dir is a temporary folder, and `made`, the provenance of the run that they
come from. What cannot be carried out is a sentence on stderr and exit status 1.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normlab import runs
from normlab.common.errors import InterruptedRunError, UserError, described, first_line
from normlab.common.terminal import say
from normlab.config import schema
from normlab.data.recorded import image_files
from normlab.launchers import single
from normlab.runs import reading
from normlab.training.distributed.processes import Processes


def main(order: Path) -> int:
    """Train the run of an order; return the exit status."""
    try:
        todo = reading.read_json(order)
        config = schema.parse(runs.completed(todo["settings"]))
        images = image_files(config)
        change = images.change(todo["made"].get("data")) if images else ""
        if images and change:
            raise UserError(f"the images in {images.path} are not those that it was trained on: {change}")
        _check_weights(config, todo["made"].get("weights"))
        config = config.model_copy(update={"device": _device(config.device, todo["made"])})
        single.train_config(config, Processes())
        return 0
    except (KeyboardInterrupt, InterruptedRunError):
        return 130
    except UserError as error:
        say(" ".join(str(error).split("\n")), file=sys.stderr)
    except Exception as error:
        say(first_line(described(error)), file=sys.stderr)
    return 1


def _check_weights(config: schema.RunConfig, recorded: object) -> None:
    """Check that the trained weights that a run starts from are those of the record.

    Raises:
        UserError: if they are not, or cannot be read.
    """
    if config.weights is None:
        return
    from normlab.models import pretrained  # imports torch, which takes seconds

    now, before = pretrained.recorded(config) or {}, recorded.get("sha256") if isinstance(recorded, Mapping) else None
    if now.get("sha256") != before:
        raise UserError(f"model.weights={config.weights} are not the weights that it started from")


def _device(setting: str, made: Mapping[str, Any]) -> str:
    """Return the device of this machine that is most like the one that was recorded."""
    import torch

    from normlab.training.device import name_of

    if setting == "cpu" or made.get("device") == name_of(torch.device("cpu")) or not torch.cuda.is_available():
        return "cpu"
    number = int(setting.partition(":")[2] or 0)
    return f"cuda:{number if number < torch.cuda.device_count() else 0}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
