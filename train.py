"""Train one run, or a sweep with -m. `conf/config.yaml` is the menu; `python train.py --help` shows it."""

import hydra
from omegaconf import DictConfig

from normlab import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(settings: DictConfig) -> float | None:
    return cli.train(settings)


if __name__ == "__main__":
    cli.friendly(main)
