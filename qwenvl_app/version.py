"""The version: in ``/readyz``, in the metrics and on the command line. pyproject.toml reads it."""

VERSION = "0.2.0"
