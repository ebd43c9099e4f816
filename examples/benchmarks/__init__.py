"""The benchmark scripts, from which all published measurements come."""
