"""Processes of a run: their start, their collectives, DeepSpeed, and the watch over them (README.md)."""
