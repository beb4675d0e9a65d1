"""Train one run, or a sweep with -m. `conf/config.yaml` is the menu; `python train.py --help` shows it."""

import hydra
from omegaconf import DictConfig

from normlab.cli import friendly
from normlab.launchers import single


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    return single.carry_out(composed)


if __name__ == "__main__":
    friendly(main)
