"""A checkpoint's directory to a model that runs: found, checked, measured, loaded."""
