"""Statistics of keys: the naive mean over tokens, computed once, and for nothing else used."""

import json

import pytest
import torch
from helpers.toys import CONTEXT, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.errors import DataError, ModelError, OutputError, PreserveError
from locft_easyedit.modeling import sampling
from locft_easyedit.training.preserve import sampled_text as sampled
from locft_easyedit.training.preserve import source_statistics as statistics
from locft_easyedit.training.preserve.kept_prompts import prompt_keys
from locft_easyedit.training.preserve.sampled_text import BEGINNINGS, OPENINGS, sampled_text
from locft_easyedit.training.preserve.source_statistics import moments_of, text_moments
from locft_easyedit.training.preserve.sources import Source

DOWN = "model.layers.{}.mlp.down_proj"
MODULES = [DOWN.format(2), "model.layers.0.self_attn.o_proj"]
KINDS = {"llama": DOWN, "gemma2": DOWN, "gpt2": "transformer.h.{}.mlp.c_proj"}
# Sums of some hundred products in float32, in another order: measured at most 3e-7 of the largest.
TOLERANCE = 3e-6

PROMPTS = [request["prompt"] for request in toy_requests(24)]
TEXT = Source("text", "text.txt", tuple(" ".join(PROMPTS[i : i + 4]) for i in range(0, 24, 4)))
SAMPLED = Source("sampled", "sampled")


def naive_keys(model, module, sequences):
    """Returns a module's keys in float64, [T, D] for each sequence, one sequence at a time."""
    found = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, inputs, __: found.append(inputs[0].double().reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence[:CONTEXT]]))
    handle.remove()
    return found


def naive_moment(keys):
    return sum(torch.outer(k, k) for k in keys) / len(keys)


def ids(texts, tokenizer=None):
    return [(tokenizer or toy_tokenizer())(text)["input_ids"] for text in texts]


def close(found, expected):
    return (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def measured(model=None, source=TEXT, modules=MODULES, *, cache=None, tokenizer=None, **options):
    return text_moments(
        model or toy_model(),
        tokenizer or toy_tokenizer(),
        modules,
        source,
        cache=cache,
        progress=False,
        **options,
    )


def moments(model, sequences, modules, **options):
    return moments_of(model, sequences, modules, description="keys", progress=False, **options)


def same(one, two):
    return (
        one.n_tokens == two.n_tokens
        and list(one.second) == list(two.second)
        and all(torch.equal(one.second[name], two.second[name]) for name in one.second)
    )


@pytest.fixture
def small(monkeypatch):
    """Sampling of a few short documents."""
    for name, value in {"DOCUMENTS": 6, "BATCH": 4, "DOCUMENT_TOKENS": 12}.items():
        monkeypatch.setattr(sampled, f"_{name}", value)
    for name, value in {"OPENED_TOKENS": 5, "ASKED_EACH": 1, "ASKED_TOKENS": 5}.items():
        monkeypatch.setattr(sampled, f"_{name}", value)


@pytest.fixture
def passes(monkeypatch):
    """The modules of each pass over the texts."""
    seen, compute = [], statistics.second_moments
    monkeypatch.setattr(
        statistics, "second_moments", lambda *a, **o: seen.append(list(a[2])) or compute(*a, **o)
    )
    return seen


# What is computed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_naive_moments(kind, last_only, batch_tokens):
    model, names = toy_model(kind), [KINDS[kind].format(layer) for layer in (2, 0)]
    sequences = [*ids(PROMPTS), [], list(range(3, 60)) * 6]
    found = moments(model, sequences, names, last_only=last_only, batch_tokens=batch_tokens)
    assert list(found.second) == names
    for name in names:
        keys = naive_keys(model, name, [s for s in sequences if s])
        keys = torch.cat([k[-1:] for k in keys] if last_only else keys)
        assert found.n_tokens == len(keys)
        assert found.second[name].dtype == torch.float32
        assert found.second[name].device.type == "cpu"
        assert close(found.second[name], naive_moment(keys))


@pytest.mark.parametrize("bos", [False, True])
def test_moments_of_a_text(bos):
    model, tokenizer = toy_model(head_dim=16), toy_tokenizer(bos=bos)
    found = measured(model, tokenizer=tokenizer)
    assert found.n_tokens == sum(map(len, ids(TEXT.texts, tokenizer)))
    for name, width in zip(MODULES, (64, 64), strict=True):
        expected = naive_moment(torch.cat(naive_keys(model, name, ids(TEXT.texts, tokenizer))))
        assert found.second[name].shape == (width, width)
        assert close(found.second[name], expected)


def test_long_passages_are_divided_not_cut():
    words = [f"word{i}" for i in range(900)]
    source = Source("text", "long.txt", (" ".join(words),))
    model = toy_model(max_position_embeddings=2000)
    pieces = statistics._parts(model, toy_tokenizer(), source, 1, None, 0, False)
    assert len(pieces[0]) == 4
    found = " ".join(toy_tokenizer().decode(piece) for piece in pieces[0])
    assert found.split() == words


def test_pieces_that_are_longer_than_the_context_are_divided_not_cut():
    words = [f"word{i}" for i in range(100)]
    source = Source("text", "long.txt", (" ".join(words),))
    [pieces] = statistics._parts(
        toy_model(max_position_embeddings=7), toy_tokenizer(), source, 1, None, 0, False
    )
    [whole] = ids([" ".join(words)])
    assert [token for piece in pieces for token in piece] == whole
    assert max(map(len, pieces)) == 7


def test_text_is_sampled_within_a_short_context(small, monkeypatch):
    longest = max(map(len, ids([*OPENINGS, *BEGINNINGS])))
    model = toy_model("gpt2", n_positions=longest + 2)
    monkeypatch.setattr(sampled, "_DOCUMENT_TOKENS", longest + 9)
    text = sampled_text(model, toy_tokenizer(), 1, cache=None, progress=False)
    assert all(map(len, (text.documents, text.opened, text.asked)))


def test_sampled_text_is_the_mean_of_two_kinds(small):
    model, tokenizer = toy_model(), toy_tokenizer()
    found = measured(model, SAMPLED, seed=3)
    text = sampled_text(model, tokenizer, 256, cache=None, seed=3, progress=False)
    kinds = [ids(text.documents), ids(text.opened)]
    assert found.n_tokens == sum(len(sequence) for kind in kinds for sequence in kind) >= 4 * 64
    for name in MODULES:
        means = [naive_moment(torch.cat(naive_keys(model, name, kind))) for kind in kinds]
        assert close(found.second[name], (means[0] + means[1]) / 2)
    # The kinds' numbers of tokens are far apart, so that another mean would show.
    assert not close(
        found.second[name],
        naive_moment(torch.cat(naive_keys(model, name, [*kinds[0], *kinds[1]]))),
    )


def test_prompt_keys_are_in_the_order_of_the_prompts():
    model, tokenizer = toy_model("gpt2"), toy_tokenizer(bos=True)
    names = [KINDS["gpt2"].format(layer) for layer in (1, 3)]
    prompts = [PROMPTS[3], "a", PROMPTS[0], PROMPTS[3], "bridge " * 400, PROMPTS[2]]
    found = prompt_keys(model, tokenizer, names, prompts)
    assert list(found) == names
    for name in names:
        expected = torch.cat(naive_keys(model, name, ids(prompts, tokenizer)))
        assert found[name].shape == expected.shape
        assert found[name].dtype == torch.float32
        assert close(found[name], expected)


def test_the_model_is_left_as_it_was(small):
    model = toy_model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured(model, SAMPLED)
    prompt_keys(model, toy_tokenizer(), MODULES, PROMPTS)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# Sampling


def test_documents_and_openings(small):
    tokenizer = toy_tokenizer()
    text = sampled_text(toy_model(), tokenizer, 1, cache=None, progress=False)
    assert (len(text.documents), len(text.opened)) == (8, 8)
    assert all(document.strip() for document in text.documents)
    assert all(map(str.startswith, text.opened, OPENINGS))
    assert len(set(text.documents)) == 8
    assert sum(map(len, ids(text.opened))) > sum(map(len, ids(OPENINGS[:8]))) + 8
    # Openings of one, two and more tokens together: each is continued as if it were alone.
    assert len({len(i) for i in ids(OPENINGS[:8])}) > 1


def test_continuations_follow_their_openings(small, monkeypatch):
    """The padding on the left is not seen: next-token distributions are those of the opening."""
    model, tokenizer = toy_model(), toy_tokenizer(eos=True)
    inputs = []
    generate = model.generate
    model.generate = lambda **o: inputs.append(o) or generate(**o)
    sampled_text(model, tokenizer, 1, cache=None, progress=False)
    opened = inputs[1]
    for row, mask, opening in zip(
        opened["input_ids"], opened["attention_mask"], OPENINGS, strict=False
    ):
        assert row[mask.bool()].tolist() == tokenizer(opening)["input_ids"][:-1]
        assert mask.tolist() == sorted(mask.tolist())


def test_more_tokens_are_the_same_text_and_more(small, tmp_path):
    model, tokenizer = toy_model(), toy_tokenizer()
    few = sampled_text(model, tokenizer, 1, cache=tmp_path, progress=False)
    many = sampled_text(model, tokenizer, 500, cache=tmp_path, progress=False)
    assert len(many.documents) > len(few.documents)
    assert many.documents[: len(few.documents)] == few.documents
    assert many.opened[: len(few.opened)] == few.opened
    n_tokens = sum(map(len, ids([*many.documents, *many.opened])))
    assert 500 <= n_tokens < 500 + 4 * 17 * 2
    assert many == sampled_text(model, tokenizer, 500, cache=None, progress=False)


@pytest.mark.parametrize("after", [0, 2, 4])
def test_interrupted_sampling_goes_on(small, tmp_path, monkeypatch, after):
    """Stopped within a round: whole rounds are kept, and nothing else is sampled again."""
    expected = measured(source=SAMPLED)
    calls, draw = [], sampling.continuations

    def failing(*args, **options):
        if len(calls) == after:
            raise KeyboardInterrupt("stop")
        calls.append(args)
        return draw(*args, **options)

    monkeypatch.setattr(sampling, "continuations", failing)
    with pytest.raises(KeyboardInterrupt, match=r"^stop$"):
        measured(source=SAMPLED, cache=tmp_path)
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept == [f"{number:05}.json" for number in range(after // 3)]
    again = []
    monkeypatch.setattr(sampling, "continuations", lambda *a, **o: again.append(a) or draw(*a, **o))
    assert same(measured(source=SAMPLED, cache=tmp_path), expected)
    rounds = len(list(tmp_path.rglob("0*.json")))
    assert len(again) == 3 * (rounds - after // 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "is damaged"),
        (lambda c: "[]", "is damaged"),
        (lambda c: json.dumps(c | {"opened": ["changed"]}), "is damaged"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "documents"}), "is damaged"),
        (lambda c: json.dumps(c | {"of": "x"}), "is of another model or sampling"),
        (lambda c: json.dumps(c | {"round": 1}), "is of another model or sampling"),
    ],
)
def test_a_round_of_no_use_is_made_anew(small, tmp_path, caplog, change, message):
    model, tokenizer = toy_model(), toy_tokenizer()
    expected = sampled_text(model, tokenizer, 1, cache=tmp_path, progress=False)
    (file,) = tmp_path.rglob("00000.json")
    whole = file.read_text()
    file.write_text(change(json.loads(whole)))
    assert sampled_text(model, tokenizer, 1, cache=tmp_path, progress=False) == expected
    assert caplog.messages == [f"{file} {message} and is made anew."]
    assert file.read_text() == whole


def test_text_of_another_model_or_seed_is_another(small, tmp_path):
    texts = [
        sampled_text(model, toy_tokenizer(), 1, cache=tmp_path, seed=seed, progress=False).documents
        for model, seed in ((toy_model(), 0), (toy_model(), 1), (toy_model(seed=1), 0))
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert len({tuple(documents) for documents in texts}) == 3


def test_a_model_that_ends_at_once(small):
    model, tokenizer = toy_model(), toy_tokenizer()
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 1000.0
    with pytest.raises(
        ModelError, match=r"hardly writes anything by itself: 0 documents.*`sampled`"
    ):
        sampled_text(model, tokenizer, 1, cache=None, progress=False)


# The cache


def test_computed_once(tmp_path, passes):
    model = toy_model()
    first = measured(model, cache=tmp_path / "new", modules=MODULES[:1])
    both = measured(model, cache=tmp_path / "new", modules=MODULES)
    assert passes == [MODULES[:1], MODULES[1:]]
    assert same(both, measured(model, cache=tmp_path / "new", modules=MODULES))
    assert len(passes) == 2
    assert torch.equal(first.second[MODULES[0]], both.second[MODULES[0]])
    assert same(both, measured(model, cache=None))
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_sampled_statistics_are_computed_once(small, tmp_path, passes, monkeypatch):
    first = measured(source=SAMPLED, cache=tmp_path)
    monkeypatch.setattr(sampling, "continuations", lambda *_, **__: pytest.fail("sampled again"))
    assert same(measured(source=SAMPLED, cache=tmp_path), first)
    assert passes == [MODULES, MODULES]  # once for each kind


def edited():
    model = toy_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    return model


def test_other_models_texts_and_tokenizers_have_other_files(tmp_path, passes, caplog):
    def file_of(**changes):
        before = set(tmp_path.iterdir())
        measured(modules=MODULES[:1], cache=tmp_path, **changes)
        return set(tmp_path.iterdir()) - before

    other = Source("text", TEXT.name, (*TEXT.texts, "One more."))
    assert len(file_of()) == 1
    assert len(file_of(model=edited())) == 1
    assert len(file_of(source=other)) == 1
    assert len(file_of(tokenizer=toy_tokenizer(bos=True))) == 1
    assert len(file_of(tokenizer=toy_tokenizer(eos=True))) == 1  # as many tokens, but others
    assert file_of(source=Source("text", "renamed.txt", TEXT.texts)) == set()
    assert len(passes) == 5
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": edited()}, "of another model"),
        ({"source": Source("text", "b", TEXT.texts[1:] + TEXT.texts[:1])}, "of another text"),
        ({"source": Source("text", "b", TEXT.texts[1:])}, "of another text and n_tokens"),
        ({"modules": [DOWN.format(1)]}, "of another module"),
    ],
)
def test_a_renamed_file_of_something_else_is_not_used(tmp_path, caplog, passes, changes, message):
    expected = measured(modules=MODULES[:1], cache=tmp_path / "a")
    measured(**({"modules": MODULES[:1], "cache": tmp_path / "b"} | changes))
    (file,), (other,) = (list((tmp_path / name).iterdir()) for name in "ab")
    whole = file.read_bytes()
    file.write_bytes(other.read_bytes())
    assert same(measured(modules=MODULES[:1], cache=tmp_path / "a"), expected)
    assert len(passes) == 3
    assert caplog.messages == [
        f"Kept statistics are not used but made anew:\n  - {file} is {message}."
    ]
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-5],
        lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],
        lambda raw: raw.replace(b"locft_key", b"locft_kez"),
        lambda raw: b"no such file" * 50,
    ],
)
def test_damaged_files_are_one_warning(tmp_path, caplog, passes, damage):
    expected = measured(cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    whole = [file.read_bytes() for file in files]
    for file, raw in zip(files, whole, strict=True):
        file.write_bytes(damage(raw))
    assert same(measured(cache=tmp_path), expected)
    assert passes == [MODULES, MODULES]
    assert len(caplog.messages) == 1
    assert all(f"{file} is damaged." in caplog.text for file in files)
    assert [file.read_bytes() for file in files] == whole


def test_what_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = r"cannot be written: .* set `preserve_dir` to a folder that you may write to"
    with pytest.raises(OutputError, match=rf"safetensors {told}"):
        measured(cache=tmp_path / "file")
    # Where not even that there is nothing can be found out.
    nowhere = tmp_path / ("x" * 300)
    with pytest.raises(OutputError, match=told):
        measured(cache=nowhere)
    with pytest.raises(OutputError, match=told):
        sampled_text(toy_model(), toy_tokenizer(), 1, cache=nowhere, progress=False)


# What is refused


def test_a_text_that_is_too_short(tmp_path):
    n_tokens = len(ids(["The capital"])[0])
    source = Source("text", "short.txt", ("The capital",))
    with pytest.raises(PreserveError, match=r"short\.txt") as caught:
        measured(source=source, modules=["model.layers.0.self_attn.o_proj", DOWN.format(1)])
    assert str(caught.value) == (
        f"`preserve: short.txt` has {n_tokens} tokens; at least 128 are needed, 2 x the 64 inputs "
        f"of `{DOWN.format(1)}`: fewer tokens than inputs leave directions that the text says "
        "nothing of. Give more text, or `sampled`."
    )
    # Exactly enough is enough.
    many = Source("text", "a", ("a",) * 128)
    assert ids(["a"]) == [ids(["a"])[0][:1]]
    assert measured(source=many).n_tokens == 128
    with pytest.raises(PreserveError, match="has 127 tokens"):
        measured(source=Source("text", "a", ("a",) * 127))


def test_modules_that_cannot_be_measured():
    names = ["model.layers.9.mlp", "model.embed_tokens"]
    calls = (
        lambda: measured(modules=names),
        lambda: moments(toy_model(), [[1]], names),
        lambda: prompt_keys(toy_model(), toy_tokenizer(), names, PROMPTS),
    )
    for call in calls:
        with pytest.raises(
            ModelError, match=r"there is no module `model\.layers\.9.*\n.*Embedding\) is not linear"
        ):
            call()


def test_numbers_that_are_not_finite(tmp_path):
    model, name = toy_model(), DOWN.format(0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = float("inf")
    for call in (
        lambda: measured(model, modules=[name], cache=tmp_path),
        lambda: prompt_keys(model, toy_tokenizer(), [name], PROMPTS),
    ):
        with pytest.raises(ModelError, match=f"inputs of `{name}` hold a NaN or an infinite"):
            call()
    assert not list(tmp_path.iterdir())


def test_no_tokens():
    with pytest.raises(DataError, match="has no tokens"):
        moments(toy_model(), [[], []], MODULES)
    with pytest.raises(DataError, match="has no tokens"):
        prompt_keys(toy_model(), toy_tokenizer(), MODULES, [])
