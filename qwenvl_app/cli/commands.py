"""The commands that ask a service: what they take. What they do is in modules of their own.

Those are imported when a command runs: the service itself imports this package, through wsgi.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qwenvl_app.cli import options


@click.command("ask", short_help="Ask a question about a picture.")
@click.argument("pictures", metavar="PICTURE...", nargs=-1, required=True)
@click.argument("question")
@options.whom
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the text.")
def ask(
    pictures: tuple[str, ...],
    question: str,
    as_json: bool,
    **asked: Any,
) -> None:
    """Ask a QUESTION about a PICTURE, or about several; - is standard input.

    The answer is printed as it is written. Ctrl-C ends it, and frees its place on the server.

    \b
    Example: qwenvl ask photo.jpg '这张图里有什么？'
             qwenvl ask photo.jpg 'what is it?' --url http://host:8000 --json

    Exit status: 0 answered, 1 refused or failed, 2 usage, 130 stopped by Ctrl-C.
    """  # noqa: D301
    with options.failures_told():
        from qwenvl_app.cli import ask as questions

        loaded = questions.load(pictures)
        with options.service(**asked) as client:
            questions.ask(client, loaded, question, as_json=as_json)


@click.command("batch", short_help="Ask about many pictures.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON lines; what it has already is not asked again.",
)
@click.option("--prompt", help="The question about pictures that have none of their own.")
@options.whom
@click.option(
    "--concurrency",
    type=click.IntRange(0, 256),
    default=0,
    help="Requests at once; 0, the default, is what the server decodes together.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    help="Seconds for which a server that is busy, loading or away is waited for.",
)
@click.option("--retry-failed", is_flag=True, help="Ask again what failed before.")
def batch(
    source: Path,
    target: Path,
    prompt: str | None,
    concurrency: int,
    patience: float,
    retry_failed: bool,
    **asked: Any,
) -> None:
    """Ask about many pictures: a folder, or a file of pictures and questions.

    SOURCE is a folder (with --prompt), a CSV with the columns image and prompt and perhaps id, or
    JSON lines with those keys. Ended in any way, the same command goes on where it stopped.

    \b
    Example: qwenvl batch photos/ --prompt 'what is it?' -o answers.jsonl
             qwenvl batch questions.csv -o answers.jsonl --url http://host:8000

    Exit status: 0 all answered, 1 some failed or are left, 2 usage, 130 stopped by Ctrl-C.
    """  # noqa: D301
    with options.failures_told():
        from qwenvl_app.cli import batch as batches

        work = batches.Work(source, target, prompt, retry_failed=retry_failed)
        try:
            if work.left:
                with options.service(**asked) as client:
                    work.run(client, concurrency, patience)
        finally:
            status = work.end()
        sys.exit(status)


@click.command("bench", short_help="Measure how fast a server is.")
@click.argument("url")
@click.option(
    "--key", envvar=options.KEY_VARIABLE, show_envvar=True, help="An API key of the server."
)
@click.option(
    "--route",
    type=click.Choice(["recognize", "chat"]),
    default="recognize",
    show_default=True,
    help="The documented route, or OpenAI's, which other servers have too.",
)
@click.option("--model", default="", help="Of the chat route; the first that is listed there.")
@click.option(
    "--clients",
    type=click.IntRange(1, 256),
    multiple=True,
    help="How many ask at once; may be given again. 1 and what the server decodes together.",
)
@click.option("-n", "--requests", type=click.IntRange(1), default=20, show_default=True)
@click.option("--prompt", default="what is it?", show_default=True)
@click.option("--side", type=click.IntRange(8, 4096), default=256, show_default=True)
@options.timeout
@options.field
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def bench(
    url: str,
    key: str | None,
    route: str,
    model: str,
    clients: tuple[int, ...],
    requests: int,
    prompt: str,
    side: int,
    timeout: float,
    fields: dict[str, str],
    as_json: bool,
) -> None:
    """Measure the server at URL, or any that has OpenAI's route, with pictures of noise.

    No two of them are the same, so that no cache helps. TTFT is the time to the first piece of an
    answer. A request that fails is counted and not asked again.

    \b
    Example: qwenvl bench http://127.0.0.1:8000
             qwenvl bench http://host:8999/v1 --route chat --clients 1 --clients 8 -n 50 --json

    Exit status: 0 all answered, 1 some failed, 2 usage, 130 stopped by Ctrl-C.
    """  # noqa: D301
    with options.failures_told():
        from qwenvl_app.cli import bench as benches
        from qwenvl_app.cli.client import Client

        load = benches.Load(route, list(clients), requests, prompt, side, model)
        whole = benches.bench(Client(url, key, timeout, fields), load, as_json=as_json)
        sys.exit(0 if whole else 1)


ALL = (ask, batch, bench)
