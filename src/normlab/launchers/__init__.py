"""How the runs of a sweep are carried out. Hydra finds a launcher through `hydra_plugins.normlab_launchers`."""
