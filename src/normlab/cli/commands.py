"""The two commands: normlab-train, which is train.py of a checkout, and normlab-report, which is report.py."""

import gc
import sys
from dataclasses import fields
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from normlab.common.errors import UserError, as_typed, switch_meant
from normlab.common.installation import CONF, command_name
from normlab.config.command_line import CommandLine
from normlab.config.hydra import (
    exit_with_error,
    run_main,
    settings_of,
    start_in_place,
)

REPORT_COMMANDS = ("status", "claims", "results", "import", "pack", "verify", "next")


def train() -> NoReturn:
    """Train one run, or a sweep with -m, as the command line says; `doctor` in front of the settings trains nothing."""
    run_main("train", ("doctor",), _train)


def report() -> NoReturn:
    """Write tables, figures and verdicts of a study, or run one of `REPORT_COMMANDS`, as the command line says."""
    gc.set_threshold(50_000, 50, 50)  # what imports and tables make stays to the end: fewer searches for cycles in it
    run_main("report", REPORT_COMMANDS, _report)


def _train(line: CommandLine) -> None:
    if line.command:
        if "--multirun" in line.flags:
            raise UserError("doctor looks at one set of settings.\nLeave out -m and the lists of a sweep.")
        sys.argv.append("hydra.mode=RUN")  # an experiment is a sweep without -m
    Plugins.instance()  # makes Hydra's own choices known
    # Hydra's product of lists with the checks of ours: the basic sweeper knows nothing of runs that share a folder.
    ConfigStore.instance().store("basic", OmegaConf.load(CONF / "hydra/sweeper/grid.yaml"), group="hydra/sweeper")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def main(composed: DictConfig) -> float | None:
        start_in_place()
        if line.command == "doctor":
            from normlab.cli import doctor

            doctor.run(composed)
        from normlab.launchers import single  # not for a report

        return single.run(composed)

    main()


def _report(line: CommandLine) -> None:
    if "--multirun" in line.flags:
        raise UserError(
            "A report is about one study at a time.\n"
            f"Leave out -m, and give one value of each setting. All studies: {command_name('report')} results"
        )

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
    def main(composed: DictConfig) -> None:
        start_in_place()
        try:
            holds = _carry_out(line.command, settings_of(composed))
        except Exception as error:
            exit_with_error(error, line)  # past Hydra, which would add a line of its own
        if not holds:
            sys.exit(1)

    main()


def _check(command: str | None, study: object, page: object, output_dir: object, watch: object) -> None:
    if not study or not isinstance(study, str):
        raise UserError(f"study={as_typed(study)} is not valid: expected a study's name, or its path.")
    if command in ("claims", "results") and study != "default":
        raise UserError(
            f"study={as_typed(study)}: `{command}` is about all studies of output_dir. Leave it out.\n"
            f"To report one study: {command_name('report')} study={study}"
        )
    if output_dir == "" or page == "":
        raise UserError(f"{'page' if output_dir else 'output_dir'}= is empty: expected a path.")
    if watch is not False and command not in (None, "status"):
        raise UserError(
            f"watch={as_typed(watch)}: `{command}` answers once. Leave it out.\nTo watch a study: "
            f"{command_name('report')} study=... watch=true, or {command_name('report')} status study=... watch=true"
        )
    if not isinstance(watch, bool):
        raise UserError(f"watch={as_typed(watch)} is not valid: expected true or false.{switch_meant('watch', watch)}")


def _carry_out(command: str | None, settings: dict[str, Any]) -> bool:
    """Carry out a command of report.py; return whether its answer is yes, as that of all but `verify` is."""
    from normlab import report

    names = [field.name for field in fields(report.Options)]
    study, page, output_dir, watch = (settings.pop(name) for name in ("study", "page", "output_dir", "watch"))
    _check(command, study, page, output_dir, watch)
    options = report.Options(**{name: settings.pop(name) for name in names})
    rerun, looks = {name: settings.pop(name) for name in ("rerun", "rerun_seed", "trust")}, settings.pop("looks")
    match command:
        case "import":
            from normlab.report.importing import import_runs  # slow to import, and no other command needs it

            import_runs(study, output_dir, settings, quiet=options.quiet)
        case "status":
            report.study_status(study, output_dir, watch=watch, quiet=options.quiet)
        case "pack":
            report.pack_study(study, output_dir, options, replace=settings["replace"], quiet=options.quiet)
        case "verify":
            return report.verify_study(study, output_dir, options, changes=settings["set"], **rerun)
        case "next":
            report.show_next(study, output_dir, options, looks)
        case "claims":
            report.build_claims(output_dir, options)
        case "results":
            report.build_results(output_dir, page, options)
        case _ if watch:
            from normlab.report.watching import watch_study  # not for a report that is made once

            watch_study(study, output_dir, options)
        case _:
            report.build(study, output_dir, options)
    return True
