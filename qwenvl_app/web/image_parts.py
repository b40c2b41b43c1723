"""The pictures of a conversation: data URLs (RFC 2397), in memory."""

from __future__ import annotations

import binascii
import re

from PIL.Image import Image

from qwenvl_app.errors import BadRequest, TooLarge
from qwenvl_app.images.decode import decode_image
from qwenvl_app.web.errors import InvalidParameter

_HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,100};base64,", re.IGNORECASE)


def load_image(url: str, param: str, max_megapixels: float) -> Image:
    """The picture that ``url`` holds; nothing is fetched. Raises InvalidParameter or TooLarge.

    ``max_megapixels``: what the pictures before it have left of a request's limit.
    """
    head = _HEAD.match(url)
    if not head:
        raise InvalidParameter(f"{param}: only data:image/...;base64,... is supported.", param)
    try:
        data = binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are such
        raise InvalidParameter(f"{param}: it is not valid base64.", param) from None
    try:
        return decode_image(data, max_megapixels=max_megapixels)
    except TooLarge:
        raise TooLarge(f"{param}: the pictures have too many pixels together.") from None
    except BadRequest:
        raise InvalidParameter(
            f"{param}: the picture is damaged, too narrow, or of a format that is not supported.",
            param,
        ) from None
