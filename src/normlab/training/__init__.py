"""The loop, optimizers, schedules, checkpoints. Importing a module of this package imports torch."""
