"""Constrained decoding: which tokens may come next. Knows schemas and a vocabulary, no model."""
