"""The command ``qwenvl``: serve, and what an operator asks before and after.

All but ``serve`` are there as ``flask --app wsgi ...`` too. Flask's own ``run``, ``routes`` and
``shell`` get the application itself.
"""

from __future__ import annotations

import logging.config
import os
import sys
import time

import click
from flask import Flask
from flask.cli import FlaskGroup

from qwenvl_app import create_app, logs
from qwenvl_app.cli import commands as asking
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import Phase
from qwenvl_app.settings import CONFIG, SECRETS, Settings, SettingsError, explain
from qwenvl_app.version import VERSION

_LINES_APART_S = 5


def application() -> Flask:
    """What ``wsgi.py`` is imported for: the application, or its commands alone.

    Those must neither load a model nor need settings that are right. It is the ``flask`` group that
    looks for them; a command that Flask has itself imports the application on its own behalf.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return create_app()
    if isinstance(context.command, FlaskGroup):
        return commands()
    settings, _ = effective()
    logging.config.dictConfig(logs.config(settings.log_format))
    app = create_app(settings)
    context.call_on_close(app.extensions["qwenvl"]["close"])
    return app


def commands() -> Flask:
    """An application that has the commands and nothing else: no route, no model, no settings."""
    app = Flask("qwenvl_app", static_folder=None)
    for command in (check_config, run_doctor, download, *asking.ALL):
        app.cli.add_command(command)
    return app


def effective() -> tuple[Settings, dict[str, str]]:
    """The settings and their origins; a wrong one ends the command with its line."""
    try:
        return explain()
    except SettingsError as error:
        click.echo(f"qwenvl: {error}", err=True)
        sys.exit(1)


@click.group()
@click.version_option(VERSION, prog_name="qwenvl")
def main() -> None:
    """Answer questions about images with a Qwen-VL model."""


@click.command("serve")
@click.option("--bind", default="127.0.0.1:8000", show_default=True, help="Where to listen.")
@click.option(
    "--model",
    help="demo, a directory, an id of ModelScope, or hf: and one of Hugging Face; as QWENVL_MODEL.",
)
def serve(bind: str, model: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C. This process becomes gunicorn's."""
    if model:
        os.environ["QWENVL_MODEL"] = model
    options = ["-c", str(CONFIG / "gunicorn.conf.py"), "--bind", bind, "qwenvl_app:create_app()"]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *options])  # noqa: S606


@click.command("check-config")
def check_config() -> None:
    """Print the effective settings and where each came from."""
    settings, origins = effective()
    rows = [(key, _shown(key, value), origins[key]) for key, value in settings]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        click.echo(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")


@click.command("doctor", short_help="Say whether the service would run here.")
@click.option("--bind", default="0.0.0.0:8000", show_default=True, help="Where it is to listen.")
def run_doctor(bind: str) -> None:
    """Check the machine against the settings; exit status 1 if the service would not run."""
    settings, _ = effective()
    if settings.backend == "remote":
        sys.exit(_ask_upstreams(settings))
    # Not at the top: torch takes seconds to import, and check-config does without.
    from qwenvl_app.cli import doctor as checks

    failed = False
    for finding in checks.examine(settings, bind):
        failed |= finding.level is checks.Level.FAIL
        click.echo(f"{finding.level:5} {finding.about}: {finding.text}")
    sys.exit(1 if failed else 0)


def _ask_upstreams(settings: Settings) -> int:
    """Print how the other servers are; the exit status is 0 if one of them would answer."""
    from qwenvl_app.backends.remote.backend import RemoteBackend  # not at the top: few need it

    backend = RemoteBackend(settings)
    try:
        backend.upstreams.wait()
        for upstream in backend.upstreams.all:
            level = "FAIL" if upstream.problem else "ok"
            click.echo(f"{level:5} upstream {upstream.name}: {upstream.problem or 'well'}")
        return 0 if backend.status().phase is Phase.READY else 1
    finally:
        backend.close()


@click.command("download", short_help="Download the model that QWENVL_MODEL names.")
def download() -> None:
    """Download the model that QWENVL_MODEL names, as the first start would.

    Exit status 1 if it fails.
    """
    settings, _ = effective()
    logging.config.dictConfig(logs.config(settings.log_format))
    # Not at the top: it takes time to import.
    from qwenvl_app.loading import checkpoint

    next_line = 0.0

    def say(message: str) -> None:
        nonlocal next_line
        if (now := time.monotonic()) >= next_line:
            next_line = now + _LINES_APART_S
            click.echo(message)

    try:
        found = checkpoint.find(settings.model, say=say)
    except ModelLoadError as error:
        click.echo(f"qwenvl: {error}", err=True)
        sys.exit(1)
    click.echo(f"{settings.model} is in {found.directory}")


def _shown(key: str, value: object) -> str:
    if key in SECRETS:
        return "(set)" if value else "(unset)"
    return str(value) if isinstance(value, str) else repr(value)


for each in (serve, check_config, run_doctor, download, *asking.ALL):
    main.add_command(each)
