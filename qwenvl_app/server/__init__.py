"""The gunicorn worker: bytes to whole requests, before Flask sees them."""
