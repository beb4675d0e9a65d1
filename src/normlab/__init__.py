"""normlab: what does a normalisation layer actually buy?"""

__version__ = "0.1.0"  # nowhere else: pyproject.toml reads it here
