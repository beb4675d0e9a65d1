"""The two commands: normlab-train, which is train.py of a checkout, and normlab-report, which is report.py."""

import sys
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from normlab.common.errors import UserError
from normlab.common.installation import CONF
from normlab.config.hydra import command_of, friendly, settings_of, stop

REPORT_COMMANDS = ("status", "claims", "results", "import")
OF_IMPORT = (  # settings of that command
    *("source", "columns", "ignore", "set", "percent", "pattern", "first_epoch", "steps_per_epoch", "replace"),
)


def train() -> NoReturn:
    """Train one run, or a sweep with -m, as the command line says; `doctor` in front of the settings trains nothing."""
    friendly(_train)


def report() -> NoReturn:
    """Tables, figures and verdicts of a study, or one of `REPORT_COMMANDS`, as the command line says."""
    friendly(_report)


def _train() -> None:
    command = command_of(sys.argv, ("doctor",), setting="norm")
    if command:
        if not {"-m", "--multirun"}.isdisjoint(sys.argv):
            raise UserError("doctor looks at one set of settings.\nLeave out -m and the lists of a sweep.")
        sys.argv.append("hydra.mode=RUN")  # an experiment is a sweep without -m

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def main(composed: DictConfig) -> float | None:
        if command == "doctor":
            from normlab.cli import doctor

            doctor.carry_out(composed)
        from normlab.launchers import single  # not for a report

        return single.run(composed)

    main()


def _report() -> None:
    command = command_of(sys.argv, REPORT_COMMANDS)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
    def main(composed: DictConfig) -> None:
        from normlab.report import Options, build, build_claims, build_results, study_status

        settings = settings_of(composed)
        study, page, output_dir, watch = (settings.pop(name) for name in ("study", "page", "output_dir", "watch"))
        of_import = {name: settings.pop(name) for name in OF_IMPORT}
        try:
            options = Options(**settings)
            if command == "import":
                from normlab.report.importing import Import, import_runs

                import_runs(study, output_dir, Import(**of_import), quiet=options.quiet)
            elif command == "status":
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
