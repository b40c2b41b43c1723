"""Measurements: ratios from one run on the same work."""
