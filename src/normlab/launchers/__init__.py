"""How the runs of a sweep are carried out. Hydra finds a launcher by the `_target_` of its YAML file."""
