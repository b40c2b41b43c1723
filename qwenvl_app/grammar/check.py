"""Whether a grammar can be compiled at all, in a process of its own: ``python check.py``.

The library bounds much of its work, but not all: whether 20 regular expressions have a string in
common takes it as long as it takes. So a grammar is tried here first, where the kernel ends what
takes too long or too much. Reads {"grammar": ..., "limits": {...}} from standard input, and writes
what is wrong with the grammar to standard output: nothing, if it is good.
"""

from __future__ import annotations

import json
import resource
import sys

from llguidance import LLMatcher, LLParserLimits

_SECONDS = 2  # of CPU time
_BYTES = 2**30


def main() -> None:
    """See above. Ends by a signal, or with another status than 0, where it is too much."""
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.load(sys.stdin)
    limits = LLParserLimits(**asked["limits"])
    sys.stdout.write(LLMatcher.validate_grammar(asked["grammar"], limits=limits))


if __name__ == "__main__":
    main()
