"""Foundations of every other package: errors and sentences, random streams, Git, cores, imports, progress."""
