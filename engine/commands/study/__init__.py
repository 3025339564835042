"""Tables of a paper as configurations: their runs, their evaluations, the tables themselves."""
