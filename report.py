"""Tables and figures of a study: python report.py study=my_study. conf/report.yaml is the manual."""

from typing import Any

import hydra

from normlab.cli import friendly


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
def main(settings: Any) -> None:
    from omegaconf import OmegaConf

    from normlab.report import build

    build(**OmegaConf.to_container(settings, resolve=True))


if __name__ == "__main__":
    friendly(main)
