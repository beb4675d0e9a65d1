"""Tables, figures and verdicts of a study: python report.py study=my_study. conf/report.yaml is the manual.

A bare word in front of the settings is a command: `python report.py status` shows how far a study's runs are,
`python report.py claims` judges all claims over all studies, `python report.py results` puts all studies on one page.
"""

import sys

import hydra
from omegaconf import DictConfig

from normlab.cli import command_of, friendly, settings_of, stop
from normlab.errors import UserError

COMMANDS = ("status", "claims", "results")


def report() -> None:
    command = command_of(sys.argv, COMMANDS)

    @hydra.main(version_base="1.3", config_path="conf", config_name="report")
    def main(composed: DictConfig) -> None:
        from normlab.report import Options, build, build_claims, build_results, study_status

        settings = settings_of(composed)
        study, page, output_dir, watch = (settings.pop(name) for name in ("study", "page", "output_dir", "watch"))
        try:
            options = Options(**settings)
            if command == "status":
                study_status(study, output_dir, watch=watch, quiet=options.quiet)
            elif command == "claims":
                build_claims(output_dir, options)
            elif command == "results":
                build_results(output_dir, page, options)
            else:
                build(study, output_dir, options)
        except UserError as error:
            stop(error)  # past Hydra, which would add a line of its own

    main()


if __name__ == "__main__":
    friendly(report)
