"""A study's records: which runs there are, what each belongs to, and what it came to."""

from normlab.report.study.load import Study, load

__all__ = ["Study", "load"]
