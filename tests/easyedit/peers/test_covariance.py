"""Key covariances: the naive sum over tokens, in files that EasyEdit itself reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toys import CONTEXT, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.easyedit.peers import covariance as module
from locft_easyedit.easyedit.peers.corpus import Corpus
from locft_easyedit.easyedit.peers.covariance import (
    covariance_file,
    stats_name,
    write_key_covariances,
)
from locft_easyedit.errors import DataError, ModelError, OutputError
from locft_easyedit.training.preserve import input_moments as key_moments

DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
# Sums of some hundred products in float32, in another order: measured at most 4e-7 of the largest.
TOLERANCE = 4e-6


def texts(n=24):
    """Documents of many lengths, one of them longer than the toys' context."""
    documents = [
        " ".join([request["prompt"]] * (1 + i % 5)) for i, request in enumerate(toy_requests(n))
    ]
    documents[n // 2] = documents[n // 2] + " and it is a bridge" * 80
    return documents


CORPUS = Corpus("toys-1", "prompts of the toys", texts())


def write(model, modules, folder, *, corpus=CORPUS, n_samples=20, tokenizer=None, **options):
    options = {"model_id": "toy", "progress": False} | options
    tokenizer = tokenizer or toy_tokenizer()
    corpus = replace(corpus, texts=corpus.texts[:n_samples])
    return write_key_covariances(model, tokenizer, corpus, modules, stats_dir=folder, **options)


def naive(model, modules, documents, tokenizer):
    """Returns each module's sum of x x^T in float64, one text and one module at a time."""
    sums, n_tokens = {}, 0
    for text in documents:
        ids = tokenizer(text)["input_ids"][:CONTEXT]
        n_tokens += len(ids)
        for name in modules:
            inputs = []
            layer = model.get_submodule(name)
            handle = layer.register_forward_hook(lambda _, x, __, seen=inputs: seen.append(x[0]))
            with torch.no_grad():
                model(torch.tensor([ids]))
            handle.remove()
            x = inputs[0][0].double()
            sums[name] = sums.get(name, 0) + x.T @ x
    return sums, n_tokens


@pytest.fixture(scope="module")
def easyedit():
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    return load_easyedit()


# What is computed


@pytest.mark.parametrize("kind", DOWN)
@pytest.mark.parametrize("bos", [False, True])
def test_naive_sum(tmp_path, kind, bos):
    model, tokenizer = toy_model(kind), toy_tokenizer(bos=bos)
    modules = [DOWN[kind].format(layer) for layer in (2, 0)]
    files = write(model, modules, tmp_path, tokenizer=tokenizer, batch_tokens=100)
    expected, n_tokens = naive(model, modules, CORPUS.texts[:20], tokenizer)
    assert list(files) == modules
    for name in modules:
        saved = np.load(files[name], allow_pickle=False)
        assert saved["mom2.mom2"].dtype == np.float32
        difference = np.abs(saved["mom2.mom2"] - expected[name].numpy()).max()
        assert difference <= TOLERANCE * expected[name].abs().max()
        assert int(saved["mom2.count"]) == n_tokens
        assert int(saved["sample_size"]) == 20
    assert max(len(tokenizer(text)["input_ids"]) for text in CORPUS.texts[:20]) > CONTEXT


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batches_do_not_matter(tmp_path, batch_tokens):
    model, modules = toy_model("gpt2"), ["transformer.h.1.mlp.c_proj"]
    (file,) = write(model, modules, tmp_path / "a", batch_tokens=batch_tokens).values()
    (other,) = write(model, modules, tmp_path / "b", batch_tokens=33).values()
    one, two = (np.load(path)["mom2.mom2"] for path in (file, other))
    assert np.abs(one - two).max() <= TOLERANCE * np.abs(one).max()


def test_wide_modules_are_summed_in_float32(tmp_path, monkeypatch):
    model, modules = toy_model(), ["model.layers.1.mlp.down_proj"]
    (file,) = write(model, modules, tmp_path / "a").values()
    monkeypatch.setattr(key_moments, "WIDEST_FLOAT64", 8)
    (other,) = write(model, modules, tmp_path / "b").values()
    one, two = (np.load(path)["mom2.mom2"] for path in (file, other))
    assert np.abs(one - two).max() <= TOLERANCE * np.abs(one).max()


def test_reduced_precision_is_summed_in_float32(tmp_path):
    model, modules = toy_model().to(torch.bfloat16), ["model.layers.1.mlp.down_proj"]
    (file,) = write(model, modules, tmp_path, batch_tokens=100_000).values()
    expected, _ = naive(model, modules, CORPUS.texts[:20], toy_tokenizer())
    saved = np.load(file)["mom2.mom2"]
    # The activations themselves differ in bfloat16 with the shape of the batch (2e-4 measured); the
    # sum in bfloat16 would differ by more than 4e-3, its rounding.
    assert np.abs(saved - expected[modules[0]].numpy()).max() <= 2e-3 * np.abs(saved).max()


def test_one_pass_that_ends_at_the_last_module(tmp_path):
    model, runs = toy_model(), []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    modules = [f"model.layers.{i}.mlp.down_proj" for i in (2, 0, 1)]
    write(model, modules, tmp_path, batch_tokens=100_000)
    assert runs == [0, 1, 2]
    # No hook of ours is left, and the model runs as before.
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n in modules)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, len(toy_tokenizer()))


def test_model_is_left_as_it_was(tmp_path):
    model = toy_model().train()
    write(model, ["model.layers.1.mlp.down_proj"], tmp_path)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_modules_of_any_place(tmp_path):
    """The attention's output too, whose inputs are of another width."""
    model = toy_model(head_dim=16)
    modules = ["model.layers.0.self_attn.o_proj", "lm_head"]
    files = write(model, modules, tmp_path)
    expected, _ = naive(model, modules, CORPUS.texts[:20], toy_tokenizer())
    for name, width in zip(modules, (64, 32), strict=True):
        saved = np.load(files[name])["mom2.mom2"]
        assert saved.shape == (width, width)
        assert np.abs(saved - expected[name].numpy()).max() <= TOLERANCE * np.abs(saved).max()


# EasyEdit reads it


def test_easyedits_own_statistics(easyedit, tmp_path):
    from easyeditor.util.runningstats import CombinedStat, SecondMoment, load_cached_state

    model, modules = toy_model(), ["model.layers.1.mlp.down_proj"]
    (file,) = write(model, modules, tmp_path).values()
    theirs = CombinedStat(mom2=SecondMoment())
    tokenizer = toy_tokenizer()
    for text in CORPUS.texts[:20]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:CONTEXT]])
        inputs = []
        hook = model.get_submodule(modules[0]).register_forward_pre_hook(
            lambda _, x, seen=inputs: seen.append(x[0])
        )
        with torch.no_grad():
            model(ids)
        hook.remove()
        theirs.add(inputs[0][0])
    expected = theirs.state_dict() | {"sample_size": 20}
    state = load_cached_state(file, {"sample_size": 20}, quiet=True, throw=True)
    assert set(state) == set(expected)
    assert str(state["mom2.constructor"]) == expected["mom2.constructor"]
    assert int(state["mom2.count"]) == expected["mom2.count"]
    assert state["mom2.mom2"].dtype == expected["mom2.mom2"].dtype
    largest = np.abs(expected["mom2.mom2"]).max()
    assert np.abs(state["mom2.mom2"] - expected["mom2.mom2"]).max() <= TOLERANCE * largest
    loaded = CombinedStat(mom2=SecondMoment(), state=state)
    ours, expected = loaded.mom2.moment(), theirs.mom2.moment()
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_easyedit_finds_the_file(easyedit, tmp_path, monkeypatch, kind):
    """`layer_stats` gives it back without asking for a data set."""
    from easyeditor.models.rome import layer_stats as theirs

    monkeypatch.setattr(theirs, "load_dataset", lambda *_, **__: pytest.fail("asked for data"))
    model, name = toy_model(kind), DOWN[kind].format(1)
    (file,) = write(model, [name], tmp_path).values()
    model.config._name_or_path = "toy"
    stat = theirs.layer_stats(
        model,
        toy_tokenizer(),
        name,
        str(tmp_path),
        stats_name(CORPUS, model),
        to_collect=["mom2"],
        sample_size=20,
        precision="float32",
    )
    saved = np.load(file)
    assert torch.equal(stat.mom2.mom2, torch.from_numpy(saved["mom2.mom2"]))
    assert stat.mom2.count == int(saved["mom2.count"]) > 0


def test_path():
    file = covariance_file(
        "model.layers.4.mlp.down_proj", stats_dir="s", model_id="m", dataset="d", n_samples=9
    )
    assert file.as_posix() == "s/m/d_stats/model.layers.4.mlp.down_proj_float32_mom2_9.npz"


# The cache


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch, kind):
    model = toy_model(kind)
    modules = [DOWN[kind].format(layer) for layer in range(3)]
    first = write(model, modules[:2], tmp_path)
    stamps = [file.stat().st_mtime_ns for file in first.values()]
    asked = []
    compute = module.second_moments
    monkeypatch.setattr(
        module, "second_moments", lambda *a, **o: asked.append(list(a[2])) or compute(*a, **o)
    )
    files = write(model, modules, tmp_path)
    assert asked == [modules[2:]]
    assert [files[name].stat().st_mtime_ns for name in modules[:2]] == stamps
    assert write(model, modules, tmp_path) == files
    assert write(model, [], tmp_path) == {}
    assert asked == [modules[2:]]
    write(model, modules[:1], tmp_path, n_samples=19)
    assert asked[1:] == [modules[:1]]


def test_another_model_or_corpus_has_another_file(tmp_path):
    names = ["model.layers.1.mlp.down_proj"]
    edited = toy_model()
    with torch.no_grad():
        edited.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    other = Corpus("toys-2", "", texts(30))
    files = [
        write(toy_model(), names, tmp_path)[names[0]],
        write(toy_model(seed=1), names, tmp_path)[names[0]],
        write(edited, names, tmp_path)[names[0]],
        write(toy_model(), names, tmp_path, corpus=other)[names[0]],
    ]
    assert len(set(files)) == 4
    assert write(toy_model(), names, tmp_path)[names[0]] == files[0]
    assert files[0].parent.name == f"{stats_name(CORPUS, toy_model())}_stats"
    assert stats_name(CORPUS, toy_model()).startswith("toys-1-")


def damage(file, how):
    content = dict(np.load(file))
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "a flipped byte":
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        file.write_bytes(bytes(raw))
    elif how == "not a zip":
        file.write_bytes(b"not a zip" * 100)
    elif how == "a missing key":
        del content["mom2.count"]
        np.savez(file, **content)
    else:
        key, value = how
        np.savez(file, **(content | {key: value}))


@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "empty",
        "a flipped byte",
        "not a zip",
        "a missing key",
        ("sample_size", np.array(3)),
        ("mom2.count", np.array(0)),
        ("mom2.constructor", np.array("something.Else()")),
        ("mom2.mom2", np.zeros((3, 3), np.float32)),
        ("mom2.mom2", np.zeros((64, 64), np.float64)),
        ("mom2.mom2", np.full((64, 64), np.nan, np.float32)),
        ("mom2.mom2", np.array({"a": 1}, dtype=object)),
    ],
    ids=str,
)
def test_a_damaged_file_is_made_anew(tmp_path, caplog, how):
    model, names = toy_model(), ["model.layers.1.mlp.down_proj"]
    (file,) = write(model, names, tmp_path).values()
    whole = dict(np.load(file))
    damage(file, how)
    write(model, names, tmp_path)
    assert f"{file} is damaged and is made anew." in caplog.text
    again = dict(np.load(file))
    assert set(again) == set(whole)
    assert all(np.array_equal(again[key], whole[key]) for key in whole)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt("stop")])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch, error):
    model, names = toy_model(), [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    savez, calls = np.savez, []

    def failing(stream, **content):
        calls.append(stream)
        if len(calls) == 2:
            stream.write(b"half of it")
            raise error
        savez(stream, **content)

    monkeypatch.setattr(np, "savez", failing)
    kind, match = (OutputError, "cannot be written: no space left")
    if isinstance(error, KeyboardInterrupt):
        kind, match = KeyboardInterrupt, "^stop$"
    with pytest.raises(kind, match=match):
        write(model, names, tmp_path)
    (left,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left.name.startswith(f"{names[0]}_float32")
    monkeypatch.setattr(np, "savez", savez)
    assert all(file.is_file() for file in write(model, names, tmp_path).values())


# What is refused


def test_modules_that_cannot_be_measured(tmp_path):
    names = ["model.layers.9.mlp.down_proj", "model.layers.1.mlp", "model.embed_tokens", "lm_head"]
    with pytest.raises(ModelError, match="cannot be measured; correct:") as caught:
        write(toy_model(), names, tmp_path)
    assert str(caught.value).split("\n")[1:] == [
        "  - there is no module `model.layers.9.mlp.down_proj`.",
        "  - `model.layers.1.mlp` (LlamaMLP) is not linear.",
        "  - `model.embed_tokens` (Embedding) is not linear.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_gets_some_tokens_only(tmp_path):
    model = toy_model()
    model.expert = torch.nn.Linear(model.config.hidden_size, 3)

    def routed(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        model.expert(hidden.reshape(-1, hidden.shape[-1])[::2])

    model.model.layers[0].register_forward_hook(routed)
    with pytest.raises(ModelError, match=r"`expert` gets \d+ of \d+ tokens .*experts\?"):
        write(model, ["expert"], tmp_path)


def test_a_module_that_is_never_run(tmp_path):
    model = toy_model()
    model.aside = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="does not run aside"):
        write(model, ["model.layers.1.mlp.down_proj", "aside"], tmp_path)
    assert not model.aside._forward_pre_hooks
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks


def test_a_corpus_without_tokens(tmp_path):
    with pytest.raises(DataError, match="The corpus has no tokens"):
        write(toy_model(), ["lm_head"], tmp_path, corpus=Corpus("x", "", [""]))


def test_numbers_that_are_not_finite(tmp_path):
    model = toy_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = float("inf")
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ModelError, match=f"inputs of `{name}` hold a NaN or an infinite number"):
        write(model, [name], tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
