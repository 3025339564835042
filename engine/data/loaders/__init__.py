"""Batches from files."""
