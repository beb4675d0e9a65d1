"""Train one run, or a sweep with -m. `conf/config.yaml` is the menu; `python train.py --help` shows it.

`python train.py doctor`, with or without settings, trains nothing and tells what a run would meet on this machine.
"""

import sys

import hydra
from omegaconf import DictConfig

from normlab.cli import command_of, friendly
from normlab.errors import UserError
from normlab.launchers import single


def train() -> None:
    command = command_of(sys.argv, ("doctor",), setting="norm")
    if command:
        if not {"-m", "--multirun"}.isdisjoint(sys.argv):
            raise UserError("doctor looks at one set of settings.\nLeave out -m and the lists of a sweep.")
        sys.argv.append("hydra.mode=RUN")  # an experiment is a sweep without -m

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(composed: DictConfig) -> float | None:
        if command == "doctor":
            from normlab import doctor

            doctor.carry_out(composed)
        return single.carry_out(composed)

    main()


if __name__ == "__main__":
    friendly(train)
