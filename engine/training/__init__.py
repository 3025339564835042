"""Both training phases."""
