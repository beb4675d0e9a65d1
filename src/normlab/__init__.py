"""normlab: what does a normalization layer actually buy?"""

__version__ = "0.8.0"  # pyproject.toml reads it from here
