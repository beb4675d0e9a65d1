"""The launchers: one run, and the runs of a sweep. Hydra finds a launcher through `hydra_plugins.normlab_launchers`."""
