"""The papers' claims and their verdicts."""
