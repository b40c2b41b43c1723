"""What the commands that ask a service have in common: whom they ask, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qwenvl_app.cli.client import Client

KEY_VARIABLE = "QWENVL_API_KEY"  # a client's; a server that finds it asks for api_keys instead


@contextmanager
def failures_told() -> Iterator[None]:
    """One line for whatever ends a command, and its exit status."""
    from qwenvl_app.cli.answers import Failed

    try:
        yield
    except Failed as error:
        click.echo(f"qwenvl: {error}", err=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        click.echo("qwenvl: stopped", err=True)
        sys.exit(130)


@contextmanager
def service(
    url: str | None, key: str | None, model: str | None, timeout: float, fields: dict[str, str]
) -> Iterator[Client]:
    """The server at ``url``; without one, the model in this process. The options of ``whom``."""
    if url:
        from qwenvl_app.cli.client import Client

        yield Client(url, key, timeout, fields)
    else:
        from qwenvl_app.cli import local

        with local.service(model, timeout, fields) as client:
            yield client


def _fields(
    context: click.Context, option: click.Parameter, given: Sequence[str]
) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for name, sign, _ in pairs:
        if not (name and sign) or name in ("image", "prompt"):
            raise click.BadParameter("write NAME=VALUE, such as max_new_tokens=200")
    return {name: value for name, _, value in pairs}


timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=130.0,  # a little more than the service's own limit
    show_default=True,
    help="Seconds without a byte after which a request is given up.",
)
key = click.option("--key", envvar=KEY_VARIABLE, show_envvar=True, help="An API key of the server.")
field = click.option(
    "-f",
    "--field",
    "fields",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_fields,
    help="Another field of the request, such as max_new_tokens=200; may be given again.",
)


def whom(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say who is asked, and how."""
    options = (
        click.option("--url", help="The server, as http://host:8000. Without it: in process."),
        key,
        click.option("--model", help="In process: which model; as QWENVL_MODEL."),
        timeout,
        field,
    )
    for option in reversed(options):
        command = option(command)
    return command
