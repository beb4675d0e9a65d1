"""A study's records as DataFrames: loading, index, arms, selection, provenance."""
