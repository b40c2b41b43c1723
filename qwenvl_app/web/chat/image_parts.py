"""The pictures of a conversation: data URLs (RFC 2397) and what was fetched, in memory."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping

from PIL.Image import Image

from qwenvl_app.errors import BadRequest, TooLarge
from qwenvl_app.images.decode import decode_image
from qwenvl_app.web.chat.image_urls import not_supported
from qwenvl_app.web.errors import InvalidParameter

_HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,100};base64,", re.IGNORECASE)


def load_image(
    url: str, param: str, max_megapixels: float, fetched: Mapping[str, bytes]
) -> tuple[Image, bytes]:
    """The picture that ``url`` holds, or whose bytes were ``fetched``, and its file.

    Raises InvalidParameter or TooLarge.

    ``max_megapixels``: what the pictures before it have left of a request's limit.
    """
    data = fetched[url] if url in fetched else _decode(url, param)
    try:
        return decode_image(data, max_megapixels=max_megapixels), data
    except TooLarge:
        raise TooLarge(f"{param}: the pictures have too many pixels together.") from None
    except BadRequest:
        raise InvalidParameter(
            f"{param}: the picture is damaged, too narrow, or of a format that is not supported.",
            param,
        ) from None


def _decode(url: str, param: str) -> bytes:
    head = _HEAD.match(url)
    if not head:
        raise not_supported(param)
    try:
        return binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are such
        raise InvalidParameter(f"{param}: it is not valid base64.", param) from None
