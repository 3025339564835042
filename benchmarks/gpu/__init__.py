"""The first half hour on a GPU, in three commands of at most nine minutes: probe and test, time steps, profile.

Each command keeps what it has after every part, ends in time, and goes on where it stopped when it is run again. It
needs torch, triton, numpy, scikit-learn and pytest; whole steps need open_clip, too: its wheels may lie in a folder.
"""
