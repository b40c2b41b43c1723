"""Running the model. Knows no HTTP."""
