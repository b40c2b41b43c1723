"""The pictures that Pillow tests itself with, many of which once crashed a decoder."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pillow_images(config: pytest.Config) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file, from the source of the very Pillow that is installed.

    pip fetches it once, from its own index, into pytest's cache. Skips the test where it can't.
    """
    version = importlib.metadata.version("pillow")
    assert config.cache is not None
    folder = Path(config.cache.mkdir("pillow-source"))
    if not list(folder.glob(f"*-{version}.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "pillow"]
        command += ["--disable-pip-version-check", "-q", "-d", str(folder), f"pillow=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            pytest.skip(f"pip could not get the source of Pillow {version}: {done.stderr[-300:]}")
    (source,) = folder.glob(f"*-{version}.tar.gz")
    with tarfile.open(source) as archive:
        for member in archive:
            if "/Tests/images/" in member.name and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                yield member.name.partition("/Tests/images/")[2], file.read()
