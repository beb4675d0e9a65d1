"""Settings of a run: their schema, and Hydra's composed values and errors."""
