"""Phantom data set: drawn radiographs with reports and labels."""
