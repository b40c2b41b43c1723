"""Which tokens may come next, where an answer has to be JSON of a schema or calls of tools.

Grammars are llguidance's (https://github.com/guidance-ai/llguidance, docs/json_schema.md): it does
a schema exactly or refuses it, and needs no table of the vocabulary for each. A schema is compiled
on the thread of the request that brings it, under limits; what comes of it is kept, and each
sequence has a copy of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenvl_app.errors import BadSchema
from qwenvl_app.generation import CALL_MARKS
from qwenvl_app.grammar.bounds import LIMITS, check_grammar, checked_schema, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwenvl_app.generation import Constraint

_KEPT = 32  # grammars; each holds some hundred KB
_LARGEST = 32_768  # characters of all schemas of a request, as JSON


class Matcher:
    """How far one sequence is in its grammar. Used by the engine's thread alone, once made.

    ``until``: the token after which the grammar begins; None if it begins at once. Up to there
    only ``ends`` are ruled out.
    """

    def __init__(self, matcher: LLMatcher, ends: Collection[int], until: int | None, width: int):
        self._matcher, self._until = matcher, until
        bits = np.ones(-(-width // 32) * 32, dtype=np.uint8)
        bits[list(ends)] = 0
        self._before = np.packbits(bits, bitorder="little").tobytes()

    def allowed(self) -> bytes:
        """One bit for each token, the first being the lowest of the first byte.

        A token that ends the answer is allowed where the answer is complete. Raises BadSchema if
        the grammar turns out to be too complex.
        """
        if self._until is not None:
            return self._before
        allowed = self._matcher.compute_bitmask()
        if self._matcher.is_error() or allowed.count(0) == len(allowed):
            raise BadSchema.too_complex()
        return allowed

    def append(self, token: int) -> None:
        """The sequence has one more token, which was allowed."""
        if self._until is None:
            self._matcher.consume_token(token)  # if it can't, ``allowed`` says so
        elif token == self._until:
            self._until = None


def penalties(allowed: list[bytes], width: int, device: torch.device) -> torch.Tensor:
    """To be added to scores: 0 for what is ``allowed``, else -inf; (matchers, ``width``).

    Eight tokens at a time from a table: a third of the time of ``torch.where`` on a CPU, and a GPU
    gets bits. The memory is the caller's to write to.
    """
    packed = torch.frombuffer(bytearray().join(allowed), dtype=torch.uint8).to(device)
    return _bytes(device).index_select(0, packed.int()).view(len(allowed), -1)[:, :width]


@lru_cache
def _bytes(device: torch.device) -> torch.Tensor:
    """(256, 8): what each byte of bits means."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits == 1, 0.0, -torch.inf).to(device)


class _Words:
    """A byte-level tokenizer as llguidance takes one: each token's bytes, and text to tokens.

    What means more than it says is ``special_token_ids``, and is no part of any text. Nor does a
    text become such a token, as it would by the tokenizer itself: a schema may ask for "<|im_end|>"
    in so many letters. And a text stays as it is, where the tokenizer may compose its letters.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, width: int, end: int):
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._plain = Tokenizer(backend.model)
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        spelling: Any = bytes_to_unicode
        byte = {letter: number for number, letter in spelling().items()}
        added = backend.get_added_tokens_decoder()
        self.eos_token_id, self.tokens = end, [b""] * width
        for word, number in backend.get_vocab().items():
            spelled = number not in added
            self.tokens[number] = bytes(map(byte.__getitem__, word)) if spelled else word.encode()
        # Words that fine-tuning added are words.
        control = [n for n, each in added.items() if each.special or not each.content.isalnum()]
        self.special_token_ids = control

    def __call__(self, text: str) -> list[int]:
        """Of a text that a grammar leaves no choice about."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)


class Grammars:
    """Constraints to matchers, for one vocabulary. May be called on any thread.

    ``width``: of the logits, which may have more entries than the vocabulary; those are ruled out.
    ``ends``: the tokens that end an answer, as ``generation_config.json`` has them. For a large
    vocabulary making one takes a second, in which no other thread gets to run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, ends: list[int]):
        self._tokenizer, self._width, self._ends = tokenizer, width, ends
        words = _Words(tokenizer, width, ends[0])
        self.spellings = words.tokens  # the bytes of every token
        self._vocabulary = LLTokenizer(TokenizerWrapper(words), eos_token=ends)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def matcher(self, constraint: Constraint | None, until: int | None) -> Matcher | None:
        """For one sequence. Raises BadSchema, which names the keyword that can't be done.

        ``until``: the token that ends the reasoning, if the prompt has opened it.
        """
        if constraint is None:
            return None
        compiled = self._compiled(self._grammar(constraint, blank=until is not None))
        if isinstance(compiled, str):
            raise refusal(compiled)
        return Matcher(compiled.deep_copy(), self._ends, until, self._width)

    def _grammar(self, constraint: Constraint, *, blank: bool) -> str:
        """In llguidance's Lark (docs/syntax.md); ``blank``: with lines that may be empty first."""
        head = "BLANK: /\\n{1,2}/\nstart: BLANK? answer\n" if blank else "start: answer\n"
        if constraint.kind == "json":
            text = f"answer: %json {checked_schema(constraint.schema)}\n"
        else:
            text = self._calls(constraint)
        if len(text) > _LARGEST:
            raise BadSchema(f"over {_LARGEST} characters")
        return head + text

    def _calls(self, constraint: Constraint) -> str:
        begin, end = (self._mark(mark) for mark in CALL_MARKS)
        tools, numbers = constraint.tools, range(len(constraint.tools))
        rules = [
            "answer: call" if constraint.single else 'answer: call ("\\n" call)*',
            f'call: {begin} "\\n" body "\\n" {end}',
            "body: " + " | ".join(f"body{number}" for number in numbers),
        ]
        for number, tool in zip(numbers, tools, strict=True):
            function = tool["function"]
            name = json.dumps(function["name"], ensure_ascii=False)
            opening = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
            schema = function.get("parameters") or {"additionalProperties": False}
            rules.append(f'body{number}: {opening} arguments{number} "}}"')
            # Each at the root of a schema of its own, where its references begin.
            rules.append(f"arguments{number}: %json {checked_schema({**schema, 'type': 'object'})}")
        return "\n".join([*rules, ""])

    def _mark(self, mark: str) -> str:
        """One token if the vocabulary has it, else its letters."""
        number = self._tokenizer.get_vocab().get(mark)
        return json.dumps(mark) if number is None else f"<[{number}]>"

    def _compile(self, grammar: str) -> LLMatcher | str:
        """What is copied for each sequence, or what is wrong with ``grammar``."""
        grammar = LLMatcher.grammar_from_lark(grammar)
        if problem := check_grammar(grammar):
            return problem
        limits = LLParserLimits(**LIMITS)
        compiled = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if not compiled.is_error():
            compiled.compute_bitmask()  # what it learns by that all copies know
        return compiled.get_error() or compiled
