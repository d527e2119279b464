"""Data sets that are made, not downloaded: `deformed_shapes`."""
