"""Random multipart forms, with what each was meant to say and what is unusual about it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

# A file is its type and bytes.
Meant = dict[str, str | tuple[str | None, bytes]]

TEXTS = {
    "utf-8": [
        "这是什么？",
        "what?",
        "图片🙂",
        "é",
        "\0\x1b[2J",
        " a\r\nb ",
        "\ufeffa",
        "안녕 привет",
        "",
    ],
    "GBK": ["这是什么？", "图片", "請問這裡有幾隻貓", "what is 颜色", "誠"],
    "gb18030": ["这是什么", "𠀀是什么字", "🙂", "图片"],
    "GB2312": ["这是什么", "蝙蝠", "what?"],
    "big5": ["這是什麼", "功許蓋", "圖片裡有什麼"],
    "Shift_JIS": ["これは何ですか", "表ソ能", "ｶﾅ"],
    "EUC-JP": ["これは何ですか", "日本語"],
    "euc-kr": ["이것은 무엇입니까", "색"],
    "iso-8859-1": ["café", "Größe"],
    "windows-1251": ["Что это?", "привет"],
    "koi8-r": ["Что это?"],
    "us-ascii": ["what is this?"],
}
# What Windows writes under a smaller charset's name: the text, and its own charset.
LARGER = {
    "GB2312": ("朱镕基", "gbk"),
    "Shift_JIS": ("①は何ですか", "cp932"),
    "euc-kr": ("똠방각하", "cp949"),
    "iso-8859-1": ("“café”", "cp1252"),
}
NOT_THEIRS = {
    "utf-8": b"\xd5\xe2\xca\xc7",
    "GBK": b"\xff\xfe",
    "us-ascii": b"caf\xe9",
    "euc-kr": b"\xa1",
}
NO_TEXT = [
    b"caf\xe9",
    b"\xff\xfe\x80 what?",
    b"\xe5\x9b",
    b"\xed\xa0\xbd\xed\xb8\x80",
    b"\x80",
    b"\xb0\xa1\0",
]
FILE_NAMES = [
    *(b'"a.png"', b"a.png", b'""', b'"a;b.png"', b'"a%22b.png"', b'"a\\"b.png"', b'"a b"', b"a=b"),
    *(b'"C:\\dir\\a.png"', b'"\\\\host\\a.png"', b'"C:\\\\dir\\\\a.png"', b'"a\'b.png"', b'"."'),
    *('"图片.png"'.encode(), '"图片.png"'.encode("gbk"), b'"\xff\xfe"', b'"' + b"a" * 3000 + b'"'),
    *(b'"C:\\"', b'"\\"', b'"a\\\\"', '"表"'.encode("cp932"), '"功"'.encode("big5")),
]
ENDS_IN_BACKSLASH = FILE_NAMES[-5:]
BOUNDARIES = [
    "b",
    "-",
    "----WebKitFormBoundary7MA4YWxkTrZu0gW",
    "a=b",
    "=",
    "a:b/c",
    "a,b",
    "a'(b)+_.?",
]
BOUNDARIES += ["x" * 200, "a.b*c", "0", "a--b", "(.*)+?", "$^", "a\\b", "gc0p4Jq0M2Yt08jU534c0p"]


@dataclass
class Sent:
    """``oddities`` are names of rows of the tables in ``test_starlette_parity.py``."""

    content_type: str = ""
    body: bytes = b""
    meant: Meant = field(default_factory=dict)
    oddities: set[str] = field(default_factory=set)


class Maker:
    """Makes one form after another, in a fixed random order."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.sent = Sent()
        self.boundary = b""
        self.charset: str | None = None  # of texts that say nothing else
        self.line_end = b"\r\n"
        self.damaged = False  # and so all in ASCII: what is no text is another matter

    def make(self) -> Sent:
        self.sent, self.charset, self.damaged = Sent(), None, False
        self.damaged = self._odd("damage", chance=0.1)
        self.line_end = b"\n" if self._odd("lines that end in LF", chance=0.01) else b"\r\n"
        self.sent.content_type = self._content_type()
        names = ["prompt", "image", *self._some(["prompt", "image", "other", "x-1", None, None])]
        self.rng.shuffle(names)
        if self._odd("_charset_", self.charset is None):
            self.charset = self.rng.choice(["GBK", "big5", "koi8-r", "utf-8"])
            names.insert(self.rng.randrange(len(names) + 1), "_charset_")
        self.sent.body = self._body([self._part(name) for name in names])
        if self.damaged:
            self._damage()
        elif not self.sent.oddities and self.rng.random() < 0.1:
            self.sent.body = self.sent.body[: self.rng.randrange(len(self.sent.body))]
        return self.sent

    def _odd(self, name: str, possible: bool = True, chance: float = 0.03) -> bool:
        if not possible or self.damaged or self.rng.random() > chance:
            return False
        self.sent.oddities.add(name)
        return True

    def _some(self, things: list) -> list:
        return [thing for thing in things if self.rng.random() < 0.15]

    def _content_type(self) -> str:
        pick = self.rng.choice
        boundary = pick(BOUNDARIES)
        if self._odd("a boundary of more than 256 characters", chance=0.01):
            boundary = "y" * 257
        if self._odd("an empty boundary", chance=0.01):
            boundary = ""
        if self.rng.random() < 0.1:
            boundary, shown = 'a"; b', '"a\\"; b"'
        elif self.rng.random() < 0.5 or not boundary:
            shown = '"' + boundary.replace("\\", "\\\\") + '"'
        else:
            shown = boundary
        self.boundary = boundary.encode()
        equals = pick(["=", "=", "=", " =", "= ", " = ", "\t=\t"])
        parameters = [pick(["boundary", "boundary", "Boundary"]) + equals + shown]
        if label := self._declared():
            quote = pick(["", '"'])
            parameters.append(f"{pick(['charset', 'Charset'])}{equals}{quote}{label}{quote}")
        parameters += self._some(["x=y", 'x="y;z"', "", "boundary*=UTF-8''x", "q"])
        self.rng.shuffle(parameters)
        mimetype = pick(["multipart/form-data", "multipart/form-data", "Multipart/Form-Data"])
        return pick(["; ", ";", " ; "]).join([mimetype, *parameters])

    def _declared(self) -> str | None:
        pick = self.rng.choice
        if self._odd("an unknown charset"):
            return pick(["nope", "x" * 200, "gb-what", "utf-9"])
        if self._odd("a codec that is no charset"):
            return pick(["rot13", "zlib", "idna", "punycode", "utf-7", "undefined"])
        if self._odd("an empty charset"):
            return " "
        if self.damaged or self.rng.random() < 0.5:
            return None
        self.charset = pick(list(TEXTS))
        return pick([self.charset, self.charset.lower(), self.charset.upper()])

    def _part(self, name: str | None) -> tuple[list[bytes], bytes]:
        pick = self.rng.choice
        if name == "_charset_":
            assert self.charset
            return [b'Content-Disposition: form-data; name="_charset_"'], self.charset.encode()
        is_file = name == "image" if self.rng.random() < 0.95 else pick([True, False])
        data = self._data()
        shown = name or pick(["", "y", "y y" if self.damaged else "名字"])
        named = [
            pick(['name="{}"', 'name="{}"', "name={}", 'NAME="{}"', 'name = "{}"']).format(shown)
        ]
        options = [named[0].encode()]
        headers = self._some(
            [b"X-A: b", b"content-length: 3", b"Content-Transfer-Encoding: base64"]
        )
        if is_file:
            options.append(self._filename())
            kind = pick([b"image/png", b"image/png", b"image/png; a=b", b"text/plain", None])
            if kind is not None:
                headers.append(
                    pick([b"Content-Type: ", b"content-type:", b"CONTENT-TYPE:   "]) + kind
                )
            value: object = (None if kind is None else kind.decode(), data)
        else:
            text, data, kind = self._text(name)
            if kind:
                headers.append(b"Content-Type: text/plain; charset=" + kind)
            value = text
        options += self._some([b"x=y", b'size="1"', b"name*=UTF-8''z", b"", b"q"])
        if self.rng.random() < 0.2:
            self.rng.shuffle(options)
        if any(option.endswith(tuple(ENDS_IN_BACKSLASH)) for option in options[:-1]):
            self.sent.oddities.add("a backslash before a quote, and more behind it")
        head = pick([b"Content-Disposition: ", b"content-disposition:"]) + pick(
            [b"form-data", b"file"]
        )
        headers.append(pick([b"; ", b";"]).join([head, *options]))
        self._oddities_of_head(headers)
        self.rng.shuffle(headers)
        if name:
            self.sent.meant[name] = value  # type: ignore[assignment]
        return headers, data

    def _oddities_of_head(self, headers: list[bytes]) -> None:
        if self._odd("a folded header", chance=0.01):
            headers[-1] = headers[-1].replace(b";", b";" + self.line_end + b" ", 1)
        if self._odd("a header line that is none", chance=0.01):
            headers.append(self.rng.choice([b"nonsense", b"a b: c", b": x", "名: x".encode()]))
        if self._odd("more than 8 headers", chance=0.01):
            headers += [b"X-%d: y" % number for number in range(9)]
        if self._odd("a header of more than 4,224 bytes", chance=0.01):
            headers.append(b"X-Long: " + b"z" * 5000)

    def _filename(self) -> bytes:
        key = self.rng.choice([b"filename=", b"filename=", b"FileName=", b"filename = "])
        if self._odd("filename* alone", chance=0.02):
            return b"filename*=UTF-8''%E5%9B%BE.png"
        plain = [name for name in FILE_NAMES if name.isascii() and b"\\" not in name]
        return key + self.rng.choice(plain if self.damaged else FILE_NAMES)

    def _text(self, name: str | None) -> tuple[str, bytes, bytes | None]:
        """A text, its bytes, and the charset that its own part declares."""
        if (odd := self._odd_text(name)) is not None:
            return odd
        charset = "us-ascii" if self.damaged else self.charset or "utf-8"
        text = self.rng.choice(TEXTS[charset])
        return text, text.encode(charset), None

    def _odd_text(self, name: str | None) -> tuple[str, bytes, bytes | None] | None:
        pick, charset = self.rng.choice, self.charset or ""
        text, data, own = "这是什么", b"", None
        if self._odd("a charset of the part's own", chance=0.02):
            own = pick(["GBK", "big5", "utf-16-le", "koi8-r"])
            text = pick(TEXTS.get(own, [text]))
            data = text.encode(own)
        elif self._odd("bytes that are not of their charset", charset in NOT_THEIRS and bool(name)):
            data = NOT_THEIRS[charset]
        elif self._odd("bytes that are no text", not charset and bool(name)):
            data = pick(NO_TEXT)
        elif self._odd("GB18030 that nobody declared", not charset):
            text = pick([text, "请描述这张图片", "what is 这个", "朱镕基", "𠀀是什么字"])
            data = text.encode("gb18030")
        elif self._odd("more characters than the charset has", charset in LARGER):
            text, larger = LARGER[charset]
            data = text.encode(larger)
        elif self._odd("UTF-8 that is declared as Latin-1", charset == "iso-8859-1", 0.2):
            data = text.encode()
        return (text, data, own.encode() if own else None) if data else None

    def _data(self) -> bytes:
        """A file's bytes, with much in it that looks like an end."""
        mark = b"--" + self.boundary
        near = [b"\r\n" + mark + end for end in (b"x", b"-", b"\r")]
        near += [b"\n" + mark + b"\r\n", mark + b"--", b"\r\n" + mark[:-1]]
        near += [b"\r\n--", b"\r", b"\n", b"\r\r\n", b"\r\n\r\n", b"-"]
        near.append(b"PNG" if self.damaged else b"\x89PNG\0\xff")
        return b"".join(self.rng.choice(near) + b"." for _ in range(self.rng.randrange(12))) or b"."

    def _body(self, parts: list[tuple[list[bytes], bytes]]) -> bytes:
        pick, mark, end = self.rng.choice, b"--" + self.boundary, self.line_end
        body = pick([b"", b"", b"", b"\r\n", b"\n\r\n"])
        if self._odd("a preamble"):
            body = b"This is a form - of many parts." + end
        first = mark
        if self._odd("white space behind the first boundary", chance=0.01):
            first += b" \t"
        for number, (headers, data) in enumerate(parts):
            line = first if number == 0 else mark + pick([b"", b"", b"", b" ", b"\t  "])
            body += end.join([line, *headers, b"", data, b""])
        tail = pick([end, end, b"", b"epilogue", end + mark + end + b"x"])
        return body + mark + b"--" + tail

    def _damage(self) -> None:
        """A token too much or too few."""
        tokens = [b"\r\n", b"\r", b"\n", b"--", b'"', b";", b":", b"=", b" ", b"\\"]
        tokens.append(b"--" + self.boundary)
        body, at = self.sent.body, self.rng.randrange(len(self.sent.body))
        after = body[at + self.rng.choice([0, 0, 1, 4]) :]
        self.sent.body = body[:at] + self.rng.choice(tokens) + after
