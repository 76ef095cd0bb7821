"""Texts to measure on: every character of a folder, or the model's own distribution."""

import pytest
import torch
from helpers.toys import toy_model, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from locft_easyedit.easyedit.peers import corpus as module
from locft_easyedit.easyedit.peers.corpus import corpus_from_folder, corpus_from_model
from locft_easyedit.errors import DataError, ModelError
from locft_easyedit.modeling import sampling
from locft_easyedit.utils.hashing import model_fingerprint
from locft_easyedit.utils.parsing import pieces_of


def write(folder, **files):
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


# A folder


def test_files_in_the_order_of_their_paths(tmp_path):
    write(tmp_path, b="two", a__z="one", c="  \n ", a__deep__er="zero", d="three\nthree")
    (tmp_path / "notes.md").write_text("not a corpus")
    corpus = corpus_from_folder(tmp_path, 10)
    assert corpus.texts == ["zero", "one", "two", "three\nthree"]
    assert corpus.description == f"4 of 4 documents in 5 .txt files of {tmp_path}"
    assert corpus == corpus_from_folder(str(tmp_path), 10)


def test_long_file_becomes_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DOCUMENT_CHARS", 100)
    text = " ".join(f"word{i}" for i in range(500)) + "\n" + "x" * 250
    write(tmp_path, long=text)
    texts = corpus_from_folder(tmp_path, 1000).texts
    assert max(map(len, texts)) <= 100
    assert [w for t in texts[:-3] for w in t.split()] == [f"word{i}" for i in range(500)]
    assert texts[-3:] == ["x" * 100, "x" * 100, "x" * 50]
    assert pieces_of("a bc d", 4) == ["a bc", "d"]
    assert pieces_of("a\nb c d", 4) == ["a\nb", "c d"]


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 12))
@settings(deadline=None)
def test_no_character_is_lost(text, limit):
    pieces = pieces_of(text, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in pieces)
    if limit > max([len(word) for word in text.split()], default=0):
        assert [word for piece in pieces for word in piece.split()] == text.split()


def test_documents_are_spread_over_the_whole(tmp_path):
    write(tmp_path, **{f"f{i:02}": f"text {i}" for i in range(10)})
    assert corpus_from_folder(tmp_path, 3).texts == ["text 0", "text 3", "text 6"]
    assert len(corpus_from_folder(tmp_path, 10).texts) == 10
    assert corpus_from_folder(tmp_path, 3).description.startswith("3 of 10 documents")


def test_names_tell_texts_apart(tmp_path):
    corpora = [
        corpus_from_folder(write(tmp_path / str(i), **files), 5)
        for i, files in enumerate(
            [{"a": "ab", "b": "c"}, {"a": "a", "b": "bc"}, {"a": "ab c"}, {"x": "ab", "y": "c"}]
        )
    ]
    names = [corpus.name for corpus in corpora]
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert all(name.startswith("folder-") and len(name) == 17 for name in names)


def test_what_a_folder_must_hold(tmp_path):
    with pytest.raises(DataError, match=r"nothing` holds no text: it has no \.txt files\."):
        corpus_from_folder(tmp_path / "nothing", 5)
    with pytest.raises(DataError, match=r"holds no text: it has no \.txt files\."):
        corpus_from_folder(tmp_path, 5)
    write(tmp_path, a=" \n", b="")
    with pytest.raises(DataError, match=r"holds no text: its 2 \.txt files are blank\."):
        corpus_from_folder(tmp_path, 5)


def test_files_that_are_no_text_are_all_named(tmp_path):
    write(tmp_path, good="text")
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=r"one\.txt is not UTF-8 \(byte 3\)\..*\n.*two\.txt is not"):
        corpus_from_folder(tmp_path, 5)


# The model itself


def sample(model=None, tokenizer=None, n=6, **options):
    options = {"tokens_per_document": 12, "batch_size": 4, "progress": False} | options
    return corpus_from_model(model or toy_model(), tokenizer or toy_tokenizer(), n, **options)


def test_samples_follow_the_seed():
    first = sample(seed=3)
    assert sample(seed=3) == first
    assert sample(seed=4).texts != first.texts
    assert sample(toy_model(seed=1), seed=3).texts != first.texts
    assert len(first.texts) == 6
    assert all(text.strip() for text in first.texts)
    assert first.name.startswith("sampled-")
    assert first.description == "6 documents of at most 12 tokens sampled from the model"


def test_nothing_of_the_program_is_changed():
    model = toy_model()
    model.generation_config = settings_before = GenerationConfig(top_k=1, do_sample=False)
    model.train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sample(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.generation_config is settings_before
    assert model.training
    assert model.model.layers[0].training


def test_a_models_own_settings_are_not_used():
    model = toy_model()
    expected = sample(model)
    model.generation_config = GenerationConfig(
        top_k=1, repetition_penalty=9.0, min_new_tokens=12, suppress_tokens=list(range(3, 300))
    )
    assert sample(model) == expected


def test_samples_have_the_models_distribution():
    """The first token after BOS of 3000 documents, against the probabilities there."""
    tokenizer, seen = toy_tokenizer(), []
    model = toy_model()
    tokenizer.batch_decode = lambda ids, **_: [seen.append(row) or "x" for row in ids.tolist()]
    sample(model, tokenizer, 3000, tokens_per_document=1, batch_size=1000)
    with torch.no_grad():
        bos = torch.tensor([[tokenizer.bos_token_id]])
        expected = model(bos).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([row[1] for row in seen]), minlength=len(expected))
    # Total variation of 3000 draws: 0.12 to 0.13 with six seeds, 0.15 at temperature 0.85.
    assert 0.5 * (counts / 3000 - expected).abs().sum() < 0.14


def test_documents_end_with_eos_and_begin_anew():
    model, tokenizer = toy_model(), toy_tokenizer()
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 4.0  # one token in eight, for this vocabulary
    ends = []
    decode = tokenizer.batch_decode
    tokenizer.batch_decode = lambda ids, **o: ends.extend(ids[:, 1:].tolist()) or decode(ids, **o)
    texts = sample(model, tokenizer, 40, tokens_per_document=30, batch_size=40).texts
    eos = tokenizer.eos_token_id
    lengths = [row.index(eos) if eos in row else len(row) for row in ends]
    assert min(lengths) < 5
    assert max(lengths) > 15
    assert all(set(row[n:]) <= {eos} for row, n in zip(ends, lengths, strict=True))
    assert not any(token in text for text in texts for token in ("</s>", "<s>", "<pad>"))


def test_tokenizer_without_bos_begins_with_eos():
    tokenizer = toy_tokenizer()
    tokenizer.bos_token = None
    expected = sample(tokenizer=tokenizer)
    starts = []
    model = toy_model()
    generate = model.generate

    def spy(**options):
        starts.append((options["input_ids"].unique().tolist(), options["eos_token_id"]))
        return generate(**options)

    model.generate = spy
    assert sample(model, tokenizer) == expected
    assert starts == [([tokenizer.eos_token_id], tokenizer.eos_token_id)] * 2
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"neither BOS nor EOS .* Set `bos_token`"):
        sample(tokenizer=tokenizer)


def test_blank_texts_are_sampled_anew():
    model, tokenizer = toy_model(), toy_tokenizer()
    answers = iter([["", "a", " \n", "b"], ["c", "", " ", ""], ["d", "e", "", "f"]])
    tokenizer.batch_decode = lambda ids, **_: next(answers)[: len(ids)]
    assert sample(model, tokenizer, 4).texts == ["a", "b", "c", "d"]
    tokenizer.batch_decode = lambda ids, **_: [""] * len(ids)
    with pytest.raises(ModelError, match="samples blank texts"):
        sample(model, tokenizer, 4, tokens_per_document=1)


# The cache


def test_texts_are_sampled_once(tmp_path, monkeypatch):
    first = sample(cache=tmp_path / "new")
    (folder,) = (tmp_path / "new").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["00000.json", "00001.json"]
    others = [sample(cache=tmp_path / "new", **c) for c in ({"seed": 1}, {"n": 5})]
    assert others[1].texts == first.texts[:5]
    others.append(sample(toy_model(seed=1), cache=tmp_path / "new"))
    assert len({corpus.name for corpus in [first, *others]}) == 4
    monkeypatch.setattr(sampling, "continuations", lambda *_: pytest.fail("sampled again"))
    assert sample(cache=str(tmp_path / "new")) == first
    assert sample(cache=tmp_path / "new", seed=1) == others[0]


# The fingerprint


def test_fingerprint_is_that_of_the_model():
    model = toy_model()
    first = model_fingerprint(model)
    assert model_fingerprint(toy_model()) == first
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    model.train()
    assert model_fingerprint(model) == first
    others = [
        toy_model(seed=1),
        toy_model(num_attention_heads=8),
        toy_model(rms_norm_eps=1e-3),
        toy_model(tie_word_embeddings=True),
        toy_model().to(torch.bfloat16),
        toy_model("mistral"),
    ]
    assert len({first, *map(model_fingerprint, others)}) == len(others) + 1


def test_fingerprint_shows_an_edit_of_any_matrix():
    first = model_fingerprint(toy_model())
    names = [name for name, p in toy_model().named_parameters() if p.ndim == 2]
    for name in names:
        model = toy_model()
        weight = model.get_parameter(name)
        with torch.no_grad():
            left, right = torch.ones(weight.shape[0]), torch.ones(weight.shape[1])
            left[::2], right[::3] = 0, 0  # as narrow as an edit of rank one gets
            weight += 1e-3 * torch.outer(left, right)
        assert model_fingerprint(model) != first


def test_fingerprint_needs_weights():
    with torch.device("meta"):
        model = toy_model()
    with pytest.raises(ModelError, match="weights are not loaded"):
        model_fingerprint(model)
