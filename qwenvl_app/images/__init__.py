"""An uploaded file to an RGB picture, in memory and under limits."""
