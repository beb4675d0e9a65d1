"""A report as Markdown, LaTeX, HTML and terminal text."""
