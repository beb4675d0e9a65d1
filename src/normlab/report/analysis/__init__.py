"""What runs are compared by: metrics, statistics, tables."""
