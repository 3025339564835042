"""Metrics, bootstrap intervals, plots and the report."""
