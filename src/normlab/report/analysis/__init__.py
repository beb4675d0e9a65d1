"""The comparison of runs: metrics, statistics, tables."""
