"""Where the scores of an evaluation come from."""
