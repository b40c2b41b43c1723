from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from qwenvl_app.engine.detokenizer import Detokenizer, StopStrings
from qwenvl_app.generation import CALL_MARKS
from qwenvl_app.loading.checkpoint import DEMO

TEXTS = [
    "plain words, and more",
    "图中有一个红色的圆形。",
    "emoji 🎉👩‍👩‍👧 and flags 🇨🇳",
    "混合 mixed ελληνικά العربية\n\n换行",
    "�",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer, text, pieces):
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.push(ids[i : i + pieces]) for i in range(0, len(ids), pieces)]
    assert "".join(deltas) + detokenizer.flush() == text
    if "�" not in text:
        assert not any("�" in delta for delta in deltas)


def test_control_tokens_are_left_out(tokenizer):
    ids = tokenizer.encode("圆形<|im_end|>")
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == "圆形"


def test_marks_of_calls_are_text_in_every_vocabulary():
    """Some have them as special tokens, which are left out: a call was mere JSON without them."""
    for special in (False, True):
        own = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
        marks = [AddedToken(mark, special=special, normalized=False) for mark in CALL_MARKS]
        own.add_tokens(marks, special_tokens=special)
        text = "<tool_call>\n好\n</tool_call>"
        ids = own.encode(text)
        assert set(own.convert_tokens_to_ids(list(CALL_MARKS))) <= set(ids)
        detokenizer = Detokenizer(own)
        pieces = [detokenizer.push([i]) for i in [*ids, own.eos_token_id]]
        assert "".join(pieces) + detokenizer.flush() == text


def test_an_answer_cut_inside_a_character_ends_as_a_whole_decode_would(tokenizer):
    ids = tokenizer.encode("好🎉")[:-1]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) == "好"
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_random_tokens_give_what_one_decode_gives(tokenizer):
    """Whatever a model writes, valid UTF-8 or not, the pieces join to the whole."""
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 30))]
        detokenizer = Detokenizer(tokenizer)
        joined = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert joined == whole


@pytest.mark.parametrize(
    ("stops", "pieces", "before", "found"),
    [
        ((), ["ab", "c"], "abc", False),
        (("b",), ["ab", "c"], "a", True),
        (("bcd",), ["ab", "c", "d", "e"], "a", True),
        (("bcd",), ["ab", "c", "e"], "abce", False),
        (("aab",), ["a", "a", "a", "b", "c"], "a", True),
        (("xyz", "c"), ["abx", "c"], "abx", True),
        (("结束",), ["答案结", "束了"], "答案", True),
        (("\n\n",), ["a\n", "\n"], "a", True),
        (("cd", "bc"), ["abcd"], "a", True),
    ],
)
def test_stop_strings_in_pieces(stops, pieces, before, found):
    cutter, text = StopStrings(stops), ""
    for piece in pieces:
        more, stopped = cutter.push(piece)
        text += more
        if stopped:
            break
    else:
        text += cutter.flush()
    assert (text, stopped) == (before, found)
