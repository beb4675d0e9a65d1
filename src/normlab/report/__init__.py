"""From the runs of a study to its tables, figures and page. Needs neither torch nor Hydra.

`load` gives a study as tidy DataFrames, for analyses of your own; `build` writes the whole report,
`build_claims` the verdicts on all claims over all studies, `build_results` both on pages; `study_status` prints
how far a study is, `show_next` what would settle what is inconclusive in it, `pack_study` makes one file of it,
`verify_study` checks it. `options` are those of conf/report.yaml.
"""

from normlab.report.options import Options, options
from normlab.report.study.load import Study, load
from normlab.report.study.status import study_status
from normlab.report.write import build, build_claims, build_results, pack_study, show_next, verify_study

__all__ = [
    "Options",
    "Study",
    "build",
    "build_claims",
    "build_results",
    "load",
    "options",
    "pack_study",
    "show_next",
    "study_status",
    "verify_study",
]
