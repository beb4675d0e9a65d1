"""A report as one HTML file that needs no network: tables that sort, figures that answer, the runs behind each cell."""

from normlab.report.render.html.contents import PageTable, cell_numbers, html_page
from normlab.report.render.html.svg import PageFigure

__all__ = ["PageFigure", "PageTable", "cell_numbers", "html_page"]
