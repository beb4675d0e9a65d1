"""What `scripts/torture fuzz` and `hostile` do to the files of a study, and how they see what comes of it."""
