"""What a measurement ran on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil


def machine() -> str:
    """Processor, cores, memory and versions, as a sentence."""
    told = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = told[1] if told else platform.machine()
    gib = psutil.virtual_memory().total / 2**30
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "gunicorn")
    )
    return (
        f"{psutil.cpu_count()} cores of {processor}, {gib:.0f} GiB;"
        f" Python {platform.python_version()}, {packages}"
    )
