"""What stands between a route and a backend: admission, deadline, record, metrics."""
