"""From the runs of a study to its tables, figures and page. Needs neither torch nor Hydra.

`load` gives a study as two tidy DataFrames, for analyses of your own; `build` writes the whole report.
"""

from normlab.report.load import Study, load
from normlab.report.write import build

__all__ = ["Study", "build", "load"]
