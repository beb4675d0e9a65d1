"""Results made elsewhere as runs of a study: `python report.py import`, which docs/import.md explains to its users.

A source is read as rows, a row per evaluation or per run; the rows of a run become a folder like that of any other
run. Its `norm.imported` keeps its identity apart from every run that normlab trains, whatever the arm's name. What the
source does not say is taken from the runs that the study has trained, and noted.
"""

import re
from pathlib import Path

from normlab.common.errors import UserError
from normlab.common.installation import command_name
from normlab.report.importing.folders import against_the_disk, complete, trained, write
from normlab.report.importing.records import records_of
from normlab.report.importing.settings import Import, some
from normlab.report.importing.sources import read

__all__ = ["Import", "import_runs"]
_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*")


def import_runs(study: str, output_dir: str | Path, wanted: Import, *, quiet: bool = False) -> None:
    """Write the runs of a source into `output_dir`/`study`, all or none, and say what was taken for granted; `quiet`:
    print the study's folder alone.

    Raises:
        UserError: for a source that cannot be read or says too little, and for runs that are there with other values.
    """
    if not _STUDY.fullmatch(str(study)):
        raise UserError(
            f"study={study} is not valid: use letters, digits, '_', '-', '+' and '.', starting with a letter or digit."
        )
    source, folder = Path(str(wanted.source)), Path(output_dir) / str(study)
    source = source if source.name else source.absolute()  # "." has no name to tell
    rows, left_out = read(source, wanted)
    records = list(records_of(rows, source.name, wanted))
    made = complete(records, trained(folder), source.name, str(study), wanted)
    for run in made:
        run.config["study"] = str(study)
    new, changed, gone = against_the_disk(made, folder, source.name, replace=wanted.replace)
    write([*new, *changed], folder, gone)
    if quiet:
        print(folder)
        return
    told = [f"{len(new)} new", f"{len(changed)} replaced", f"{len(made) - len(new) - len(changed)} there already"]
    print(f"{source.name}: {len(made)} run{'s' * (len(made) != 1)} for study {study}: {', '.join(told)}.")
    for sentence in dict.fromkeys(line for run in made for line in run.provenance["imported"]["assumed"]):
        print(f"Assumed: {sentence}")
    if left_out:
        print(f"Left out: {some(left_out)}.")
    if not new and not changed:
        print("Nothing was changed.")
    print(f"Tables and figures: {command_name('report')} study={study}")
