"""HTTP: what a client sends and what it gets."""
