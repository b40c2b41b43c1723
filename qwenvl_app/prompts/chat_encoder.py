"""A rendered chat template to token ids, where no text of a user's is a control token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from qwenvl_app.errors import BadRequest

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one that stands alone
_BAD_TEXT = ("文本中有不完整的 Unicode 字符（单独的代理项）。", "A text has a lone surrogate.")


class ChatEncoder:
    """A rendered template to token ids, as the tokenizer's own; may be called on any thread.

    Added tokens are found here and not by the tokenizer, which would find a user's too: it can
    leave out special ones alone (``split_special_tokens``), and keeps that as state on an object
    that all threads share (vllm #40949). What lies between is encoded by its model without any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._plain = Tokenizer(backend.model)  # the same object: its tables are there once
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items()}
        # The longest of those that begin at one place, as the tokenizer takes it.
        longest_first = map(re.escape, sorted(self._ids, key=len, reverse=True))
        self._token = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        # Lone surrogates, which no text has that came as UTF-8: nobody can write them.
        guarded = sorted({_first(token.content) for token in added.values() if _is_control(token)})
        self._guards = {ord(own): chr(0xD800 + place) for place, own in enumerate(guarded)}
        self._restored = {ord(guard): own for own, guard in self._guards.items()}

    def guard(self, text: str) -> str:
        """A user's ``text``, to be rendered: it has no control token, nor any part that begins one.

        Where such tokens begin it has a stand-in, of which ``encode`` makes the text again. So two
        texts that a template joins make no token either, and a template that looks for one finds
        none. White space stays, which templates trim. BadRequest for a lone surrogate.
        """
        if _SURROGATE.search(text):
            raise BadRequest(*_BAD_TEXT)
        return text.translate(self._guards)

    def encode(self, rendered: str) -> list[int]:
        """Token ids. A control token is only what the template wrote."""
        ids: list[int] = []
        for place, piece in enumerate(self._token.split(rendered)):
            if place % 2:
                ids.append(self._ids[piece])
            elif piece:
                text = piece.translate(self._restored)
                ids += self._plain.encode(text, add_special_tokens=False).ids
        return ids


def _is_control(token: AddedToken) -> bool:
    """Whether it means more than it says. Words that fine-tuning added to a vocabulary do not."""
    return token.special or not all(each.isalnum() or each.isspace() for each in token.content)


def _first(token: str) -> str:
    """What a guard stands for: white space goes unguarded, since templates trim it."""
    return token.strip()[:1] or token[0]
