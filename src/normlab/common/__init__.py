"""What every other package stands on: errors, random streams, Git, cores, imports, progress."""
