"""The demo, and tools for people who work on the engine."""
