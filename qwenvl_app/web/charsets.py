"""Bytes of a form to text: in the charset that was declared, else UTF-8, else GB18030."""

from __future__ import annotations

import re
import unicodedata
from encodings import normalize_encoding
from encodings.aliases import aliases

from qwenvl_app.errors import BadRequest

# Those of the WHATWG Encoding Standard, by Python's names. Many codecs of Python's are no charsets
# (zlib, rot13, idna, unicode_escape), and one that is looked up in vain is remembered for ever.
_SUPPORTED = {
    *("utf_8", "utf_16", "utf_16_le", "utf_16_be", "ascii", "latin_1", "koi8_r", "koi8_u"),
    *("gb2312", "gbk", "gb18030", "big5", "big5hkscs", "cp950", "euc_kr", "cp949"),
    *("shift_jis", "cp932", "euc_jp", "iso2022_jp", "mac_roman", "mac_cyrillic", "cp866", "cp874"),
    *(f"iso8859_{number}" for number in (*range(2, 12), *range(13, 17))),
    *(f"cp125{number}" for number in range(9)),
}
_LONGEST_LABEL = 100  # bytes of a charset's name that are looked at
# What is tried in turn for what is declared. Windows writes larger charsets under the names of
# smaller ones; libraries declare Latin-1 of their own accord, and hardly a text in it is UTF-8.
_READ_AS = {
    "latin_1": ("utf_8", "latin_1", "cp1252"),
    "gb2312": ("gb2312", "gb18030"),
    "gbk": ("gbk", "gb18030"),
    "big5": ("big5", "cp950"),
    "shift_jis": ("shift_jis", "cp932"),
    "euc_kr": ("euc_kr", "cp949"),
}
# Characters of GB18030; as group 1 those that bytes of other encodings look like.
_GB18030 = re.compile(
    rb"""
    [\x81-\xfe][0-9]..
    | ( [\xd8-\xf7][\xa1-\xfe]  # GB 2312's second level: two letters of Cyrillic or Latin-1
      | [\x81-\xfe][A-Za-z] | [A-Za-z][\x81-\xfe][@-~]  # a letter of Latin-1 in a word
      | \x82[\x9f-\xf1] | \x83[\x40-\x96] )  # kana in Shift_JIS
    | [\x81-\xfe].""",
    re.DOTALL | re.VERBOSE,
)
# Characters of UTF-8 from three bytes on, and one that is cut off. GB18030 hardly has any of them.
_UTF_8 = re.compile(
    rb"[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
    rb"|(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
)


def find(label: bytes) -> str:
    """Python's name for a charset. Raises BadRequest for one that is not supported."""
    name = normalize_encoding(label[:_LONGEST_LABEL].decode("latin-1")).lower()
    name = aliases.get(name, name)
    if name not in _SUPPORTED:
        raise BadRequest("不支持所声明的字符集（charset），请使用 UTF-8。")
    return name


def decode(data: bytes, charset: str | None) -> str | None:
    """``data`` as text, or None if it is none; ``charset`` is what was declared, by ``find``.

    All that is valid UTF-8 is text. In any other charset a control character is none, so that a
    picture which was sent as a field is not read as one.
    """
    for name in _READ_AS.get(charset, (charset,)) if charset else ("utf_8", "gb18030"):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if name == "utf_8" or (_has_none(text, "Cc") and (charset or _is_chinese(data, text))):
            return text
    return None


def show(data: bytes) -> str:
    """``data`` as it may be shown in an error: as text, or else each byte as a character."""
    text = decode(data, None)
    return data.decode("latin-1") if text is None else text


def _has_none(text: str, *categories: str) -> bool:
    """Whether no character is of these general categories, white space aside."""
    return not any(unicodedata.category(sign) in categories for sign in set(text) - set("\t\n\r\f"))


def _is_chinese(data: bytes, text: str) -> bool:
    """Whether ``data``, which is ``text`` as GB18030, was meant so; nearly any bytes are GB18030.

    Not if a character is unassigned or for private use, if most of it is damaged UTF-8, or if more
    than half of the characters are what other encodings look like. Korean and Cyrillic capitals,
    each pair of which is an everyday hanzi, can't be told from Chinese.
    """
    if not _has_none(text, "Cn", "Co"):
        return False
    high = len(data) - len(data.translate(None, bytes(range(128, 256))))
    if 2 * sum(map(len, _UTF_8.findall(data))) > high:
        return False
    odd = [bool(match[1]) for match in _GB18030.finditer(data)]
    return 2 * sum(odd) <= len(odd)
