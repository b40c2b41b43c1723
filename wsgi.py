"""The WSGI entry point: ``gunicorn -c config/gunicorn.conf.py wsgi:app``.

For ``flask --app wsgi ...`` it is the commands alone, since those must neither load a model nor
need settings that are right. (Flask's development server is no way to serve this.)
"""

from qwenvl_app import cli, create_app

app = cli.commands() if cli.is_running() else create_app()
