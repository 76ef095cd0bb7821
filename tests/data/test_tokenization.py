"""Edits as token ids: where the target begins, what is appended, and what is refused."""

import numpy as np
import pytest
from helpers.toys import toy_requests, toy_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from locft_easyedit.data import tokenization as tokens
from locft_easyedit.data.requests import Edit, distinct_edits
from locft_easyedit.data.tokenization import TokenizedTexts, tokenize_edits
from locft_easyedit.errors import ModelError, RequestError

TEXTS = [
    ("The capital of Norway is", "Oslo"),
    ("The capital of Norway is", " Oslo"),
    ("The capital of Norway is", "  Oslo"),
    ("The capital of Norway is ", "Oslo"),
    ("The capital of Norway is  ", " Oslo"),
    ("The capital of Norway is\n", "Oslo"),
    (" The capital is", "the capital of the capital."),
    ("Where? It is in", "a"),
    ("Name:\t", "\tTab"),
    ("Die Straße in München heißt", "Königstraße"),
    ("日本の首都は", "東京です"),
    ("Caf\u00e9", "cre\u0300me"),  # composed and decomposed
    ("Flags \U0001f1eb\U0001f1f7 and \U0001f468\u200d\U0001f469", "\U0001f600!"),
    ("Ends in half a ligature \ufb01", "\ufb02ow"),
    ("Zero\u200bwidth", "\u200bspace"),
    ("Says <s> in the text", "and </s> too"),
    ("1932", "1149"),
    ("'", "''"),
    ("It is based on", "a novel that was written by a professor of medicine in Vienna. " * 3),
]
OPTIONS = [{}, {"bos": True}, {"eos": True}, {"bos": True, "eos": True}, {"across_words": True}]


def edits_of(texts):
    return [Edit(prompt, target, i) for i, (prompt, target) in enumerate(texts)]


EDITS = edits_of(TEXTS) + distinct_edits(toy_requests(20)).edits


class WithoutOffsets:
    """A tokenizer that gives no character offsets, as those written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        assert not options.get("return_offsets_mapping")
        return self.tokenizer(texts, **options)


def sequences(texts):
    return [texts.ids[a:b].tolist() for a, b in zip(texts.offsets, texts.offsets[1:], strict=False)]


def split(tokenizer, texts):
    """Returns the decoded prompt part and target part of each sequence."""
    return [
        (tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]))
        for ids, start in zip(sequences(texts), texts.target_start, strict=True)
    ]


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


# The boundary


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_text_is_there_and_the_target_part_holds_the_target(options):
    tokenizer = toy_tokenizer(**options)
    texts = tokenize_edits(tokenizer, EDITS)
    for edit, (prompt, target) in zip(EDITS, split(tokenizer, texts), strict=True):
        whole = edit.prompt + (edit.target if edit.target[0] == " " else " " + edit.target)
        assert prompt + target == "<s>" * options.get("bos", False) + whole + "</s>"
        assert target.endswith(edit.target + "</s>")


@pytest.mark.parametrize(("prompt", "target"), TEXTS)
def test_no_word_of_the_prompt_counts_as_target(prompt, target):
    tokenizer = toy_tokenizer()
    ((_, scored),) = split(tokenizer, tokenize_edits(tokenizer, edits_of([(prompt, target)])))
    assert scored.strip(" \t\n") == (target + "</s>").strip(" \t\n")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fallback_without_offsets_agrees(options):
    tokenizer = toy_tokenizer(**options)
    assert same(
        tokenize_edits(WithoutOffsets(tokenizer), EDITS),
        tokenize_edits(tokenizer, EDITS),
    )


def test_offsets_without_leading_spaces_agree():
    """GPT-2's tokenizer reports a token's place without its space."""
    tokenizer = toy_tokenizer()
    expected = tokenize_edits(tokenizer, EDITS)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spans = tokenizer("a b", return_offsets_mapping=True)["offset_mapping"]
    assert spans == [(0, 1), (2, 3)]
    assert same(tokenize_edits(tokenizer, EDITS), expected)


@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets], ids=["offsets", "fallback"])
@pytest.mark.parametrize(
    ("prompt", "target", "prompt_part", "target_part"),
    [
        # "o " is one token: it takes the last letter of the prompt along.
        ("The capital o", "f France", "The capital ", "o f France</s>"),
        ("Torino: The capital", "of France", "Torino: ", "The capital of France</s>"),
        ("The", "capital of France", "", ""),
    ],
)
def test_token_across_the_boundary_is_target(wrap, prompt, target, prompt_part, target_part):
    tokenizer = toy_tokenizer(across_words=True)
    edits = edits_of([(prompt, target)])
    if not prompt_part:  # nothing before the merged token could predict it
        with pytest.raises(RequestError, match="no token of the target can be predicted"):
            tokenize_edits(wrap(tokenizer), edits)
        return
    texts = tokenize_edits(wrap(tokenizer), edits)
    assert split(tokenizer, texts) == [(prompt_part, target_part)]


@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets], ids=["offsets", "fallback"])
def test_segmentation_that_differs_long_before_the_boundary(wrap):
    scores = {"<unk>": 0, "</s>": 0, "ab": -5, "bc": -4, "c d": -3}
    scores |= dict.fromkeys("abcd ", -10)
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.tokenize("abc") == ["a", "bc"]
    assert tokenizer.tokenize("abc d") == ["ab", "c d"]
    texts = tokenize_edits(wrap(tokenizer), [Edit("abc", "d", 0)])
    assert split(tokenizer, texts) == [("ab", "c d</s>")]


@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets], ids=["offsets", "fallback"])
@pytest.mark.parametrize(
    ("prompt", "target", "start"),
    [
        ("It is", "known", 2),
        ("It is", "strange", 2),
        ("It is strange", "known", 3),
        ("It is strange", "odd known", 3),
        ("strange", "odd known", 1),
    ],
)
def test_unknown_words_have_their_place(prompt, target, start, wrap):
    vocabulary = {"<unk>": 0, "</s>": 1, "It": 2, "is": 3, "known": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    texts = tokenize_edits(wrap(tokenizer), [Edit(prompt, target, 0)])
    assert texts.target_start.tolist() == [start]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("Oslo", " Oslo"), (" Oslo", " Oslo"), ("  Oslo", "  Oslo"), ("\nOslo", " \nOslo")],
)
def test_one_leading_space(target, expected):
    tokenizer = toy_tokenizer()
    texts = tokenize_edits(tokenizer, [Edit("It is", target, 0)])
    assert split(tokenizer, texts) == [("It is", expected + "</s>")]


# End of sequence


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_eos_is_there_once(options, append_eos):
    tokenizer = toy_tokenizer(**options)
    eos = tokenizer.eos_token_id
    edits = [edit for edit in EDITS if "</s>" not in edit.target]
    for ids in sequences(tokenize_edits(tokenizer, edits, append_eos=append_eos)):
        # A tokenizer's own EOS stays in any case.
        assert ids.count(eos) == (append_eos or options.get("eos", False))
        assert (ids[-1] == eos) == (append_eos or options.get("eos", False))


def test_no_eos_token():
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"`append_eos=True` needs an end-of-sequence token"):
        tokenize_edits(tokenizer, EDITS)
    without = tokenize_edits(tokenizer, EDITS, append_eos=False)
    assert same(without, tokenize_edits(toy_tokenizer(), EDITS, append_eos=False))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pad_token_and_padding_side_change_nothing(options, side):
    tokenizer = toy_tokenizer(pad_is_eos=True, **options)
    tokenizer.padding_side = tokenizer.truncation_side = side
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert same(tokenize_edits(tokenizer, EDITS), tokenize_edits(toy_tokenizer(**options), EDITS))


def test_tokenizers_own_limit_does_not_truncate():
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 5
    assert same(tokenize_edits(tokenizer, EDITS), tokenize_edits(toy_tokenizer(), EDITS))


# What is refused


def test_context_length_is_a_limit_to_the_token():
    edits = edits_of([("It is", "a"), TEXTS[-1], ("It is", "Oslo"), TEXTS[-1]])
    length = int(tokenize_edits(toy_tokenizer(), edits).lengths.max())
    assert len(tokenize_edits(toy_tokenizer(), edits, max_positions=length)) == 4
    with pytest.raises(RequestError, match="The requests cannot be trained") as caught:
        tokenize_edits(toy_tokenizer(), edits, max_positions=length - 1)
    lines = str(caught.value).split("\n")[1:]
    assert len(lines) == 2
    for line, number in zip(lines, (1, 3), strict=True):
        assert line.startswith(f"  - request {number} ('It is based on' -> 'a novel that was")
        assert f"has {length} tokens; the model's context is {length - 1}." in line
        assert len(line) < 250


@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets], ids=["offsets", "fallback"])
@pytest.mark.parametrize("options", [{}, {"append_eos": False}], ids=str)
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize(("prompt", "target"), [("In the year", "1932"), ("1932", "Oslo")])
def test_target_or_prompt_without_a_token(prompt, target, eos, options, wrap):
    tokenizer = toy_tokenizer(eos=eos)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" ?[0-9]+"), "")
    edits = edits_of([("It is", "a"), (prompt, target)])
    # The end of sequence alone, or a first word without a predecessor, is nothing to train.
    with pytest.raises(RequestError, match=r"request 1 .*: no token of the target") as caught:
        tokenize_edits(wrap(tokenizer), edits, **options)
    assert "request 0" not in str(caught.value)


# Flat arrays


def test_from_lists():
    texts = TokenizedTexts.from_lists([[5, 6, 7], [8, 9]], [1, 1])
    assert texts.ids.tolist() == [5, 6, 7, 8, 9]
    assert texts.offsets.tolist() == [0, 3, 5]
    assert texts.lengths.tolist() == [3, 2]
    assert texts.target_start.tolist() == [1, 1]
    assert len(texts) == 2
    assert {a.dtype for a in vars(texts).values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("chunk", [1, 7, len(EDITS), len(EDITS) + 1])
@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets], ids=["offsets", "fallback"])
def test_chunks_change_nothing(monkeypatch, chunk, wrap):
    expected = tokenize_edits(toy_tokenizer(), EDITS)
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    assert same(tokenize_edits(wrap(toy_tokenizer()), EDITS), expected)
