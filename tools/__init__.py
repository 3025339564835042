"""For people who work on the engine, and the demo."""
