"""A report as one HTML file that needs no network: tables that sort, figures that answer, the runs behind each cell."""

from normlab.report.render.html.contents import PageFigure, PageTable, html_page

__all__ = ["PageFigure", "PageTable", "html_page"]
