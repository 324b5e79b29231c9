"""The networks that are small enough to serve."""
