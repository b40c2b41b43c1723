"""The WSGI entry point: ``gunicorn -c config/gunicorn.conf.py wsgi:app``.

And that of ``flask --app wsgi ...``, see ``cli.py``. Flask's development server (``run``) is for
development: it has neither the worker's limits nor its way to stop.
"""

from qwenvl_app import cli

app = cli.application()
