"""Tables and figures of a study: python report.py study=my_study. conf/report.yaml is the manual."""

import hydra
from omegaconf import DictConfig

from normlab.cli import friendly, settings_of


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
def main(composed: DictConfig) -> None:
    from normlab.report import build

    build(**settings_of(composed))


if __name__ == "__main__":
    friendly(main)
