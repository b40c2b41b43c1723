"""What a checkpoint's chat template can do, found out by rendering it."""

from __future__ import annotations

from collections.abc import Callable

TEXT = "\x00text\x00"  # a text that no template has of its own
PICTURE = {"type": "image"}
_NAME = "qwenvl_probe"
# A definition, and a call of it.
_TOOL = {
    "id": "1",
    "type": "function",
    "function": {"name": _NAME, "description": "", "arguments": {}, "parameters": {}},
}


def keeps_order(render: Callable[..., str], pictures: Callable[[str], int]) -> bool:
    """Whether the pictures of several turns are placed in their turns.

    ``pictures`` counts those in what was rendered.
    """
    first, second = ([PICTURE, {"type": "text", "text": f"{TEXT}{n}"}] for n in "13")
    try:
        rendered = render(
            [
                {"role": "user", "content": first},
                {"role": "assistant", "content": f"{TEXT}2"},
                {"role": "user", "content": second},
            ]
        )
    except Exception:  # any: a template is a program, and this one takes one turn alone
        return False
    pieces = rendered.split(TEXT)
    found = [pictures(piece) for piece in pieces]
    return [piece[:1] for piece in pieces[1:]] == ["1", "2", "3"] and found == [1, 0, 1, 0]


def takes_tools(render: Callable[..., str]) -> bool:
    """Whether it tells the model of tools, and of calls in earlier turns."""
    asked = {"role": "user", "content": "x"}
    called = {"role": "assistant", "content": "", "tool_calls": [_TOOL]}
    try:
        offered = render([asked], tools=[_TOOL])
        earlier = render([asked, called, {"role": "tool", "content": "x"}])
    except Exception:  # any, as above
        return False
    return _NAME in offered and _NAME in earlier
