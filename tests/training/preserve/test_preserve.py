"""`preserve`: a confined change against plain code, the promise it makes, and what it refuses."""

import copy
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.reference import naive_locft_bf
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from helpers.two_devices import two_devices
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import locft_easyedit.training.preserve.filters
import locft_easyedit.training.preserve.protection
from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.training_texts import subjects_of
from locft_easyedit.errors import PlaceError, PreserveError
from locft_easyedit.modeling.places import select_place
from locft_easyedit.training.preserve.filters import Filters, adam_of, cache_folder
from locft_easyedit.training.preserve.neighbours import neighbours_of
from locft_easyedit.training.preserve.spectral_filter import (
    basis_of,
    mixed,
    ordinary_trace,
    spectral_filter,
)
from locft_easyedit.training.session import EditSession

# Measured over 12 steps with rates of 1e-2: the matrices differ by 2e-6 to 1.2e-5 of the change,
# by rounding: W + A S is one matrix in the plain code and W x + A (S x) here.
CHANGE_TOLERANCE = 1e-4
# A protected text's logits, relative: 1e-7 to 4e-7 measured, where the edit moves others by 0.1.
KEPT_TOLERANCE = 2e-6


def confined_hparams(kind="llama", **changes):
    values = {
        "rewrite_module_tmp": DOWN_PROJECTION[kind],
        "preserve": ["sampled"],  # what it leads to is put in by the tests
        "num_steps": 4,
        "row_tokens": 40,
        "lr": 1e-2,
    }
    return toy_hparams(**(values | changes))


def random_filters(model, hparams, seed=0, *, outputs=False):
    """Returns a filter for each matrix that is neither symmetric nor the identity."""
    place = select_place(model, hparams.layers, hparams.templates)
    found, draw = {}, torch.Generator().manual_seed(seed)
    for name, p in place.parameters.items():
        conv = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        n = p.shape[int(conv) if outputs else 1 - int(conv)]
        found[name] = torch.eye(n) + 0.3 * torch.randn(n, n, generator=draw)
    return found


@pytest.fixture
def with_filters(monkeypatch):
    """Lets an edit find given filters, whatever `preserve` says."""

    def use(filters, outputs=None):
        monkeypatch.setattr(
            locft_easyedit.training.preserve.protection,
            "filters_for",
            lambda *_, **__: Filters(filters, {"given": 1}, outputs=outputs or {}),
        )

    return use


class _Sum(nn.Module):
    def __init__(self, a, s, t, transposed):
        super().__init__()
        self.a, self.s, self.t, self.transposed = nn.Parameter(a), s, t, transposed

    def change(self):
        change = self.t @ self.a @ self.s
        return change.T if self.transposed else change

    def forward(self, weight):
        return weight + self.change()


def reference_change(model, requests, hparams, filters, outputs):
    """Trains A of W + T A S naively in a copy; returns what was added, and the step losses."""
    plain = copy.deepcopy(model).eval()
    sums = {}
    for name, s in filters.items():
        module = plain.get_submodule(name.rpartition(".")[0])
        conv = isinstance(module, Conv1D)
        n_out = module.weight.shape[1 if conv else 0]
        t = outputs.get(name, torch.eye(n_out))
        sums[name] = _Sum(torch.zeros(n_out, s.shape[0]), s, t, conv)
        parametrize.register_parametrization(module, "weight", sums[name])
    losses, _ = naive_locft_bf(
        plain,
        toy_tokenizer(),
        requests,
        [x.a for x in sums.values()],
        hparams,
        **adam_of(len(requests), hparams),
    )
    return {name: one.change().detach() for name, one in sums.items()}, losses


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("cut", ["matrix", "layer", None])
@pytest.mark.parametrize("both_sides", [True, False])
def test_a_confined_change_is_that_of_plain_code(kind, cut, both_sides, with_filters):
    hparams = confined_hparams(kind, **({"prefix_cut": cut} if cut else {"frozen_prefix": False}))
    model, requests = toy_model(kind), toy_requests(18)
    filters = random_filters(model, hparams)
    outputs = random_filters(model, hparams, seed=1, outputs=True) if both_sides else {}
    expected, losses = reference_change(model, requests, hparams, filters, outputs)
    with_filters(filters, outputs)
    result = edit_model(model, toy_tokenizer(), requests, hparams, progress=False)
    assert result.step_losses == pytest.approx(losses, rel=1e-4)
    for name, change in expected.items():
        found = result.new[name] - result.original[name]
        assert float((found - change).norm() / change.norm()) < CHANGE_TOLERANCE
        assert torch.equal(model.get_parameter(name), result.new[name])


def test_both_filters_train_again_in_a_half_precision_and_inference_mode(with_filters):
    hparams = confined_hparams(dtype="bfloat16")
    model = toy_model("llama").to(torch.bfloat16)
    with_filters(random_filters(model, hparams), random_filters(model, hparams, 1, outputs=True))
    requests, tokenizer = toy_requests(4), toy_tokenizer()
    with (
        torch.inference_mode(),
        EditSession(model, tokenizer, requests, hparams, progress=False) as session,
    ):
        first = session.train_([0, 1])
        second = session.train_([2, 3])
    for name, value in second.new.items():
        assert torch.equal(second.original[name], first.new[name])
        assert not torch.equal(value, second.original[name])


def test_where_the_prefix_ends_at_the_matrix_its_constants_are_recorded(with_filters):
    model, hparams = toy_model("llama"), confined_hparams()
    with_filters(random_filters(model, hparams))
    with EditSession(model, toy_tokenizer(), toy_requests(6), hparams, progress=False) as session:
        prefix = session._runner.prefix
        assert prefix.cut.fold is not None
        plain = next(cut for cut in session.shortcuts.cuts if cut.kind == "matrix")
        assert prefix.store.width == plain.width  # a step moves and computes what it did


def test_a_second_training_goes_on_from_the_first_ones_weights(with_filters):
    model, hparams = toy_model("llama"), confined_hparams()
    filters, requests = random_filters(model, hparams), toy_requests(6)
    with_filters(filters)
    with EditSession(model, toy_tokenizer(), requests, hparams, progress=False) as session:
        first = session.train_()
        expected, _ = reference_change(model, requests, hparams, filters, {})
        second = session.train_()
        [name] = expected
        found = second.new[name] - first.new[name]
        # Its states are recorded anew, with other constants.
        assert float((found - expected[name]).norm() / expected[name].norm()) < 1e-3
        first.restore_(model)
        again = session.train_()
    assert torch.equal(again.new[name], first.new[name])


def test_the_module_and_its_flags_are_as_before(with_filters):
    model, hparams = toy_model("llama"), confined_hparams()
    forwards = [vars(module).get("forward") for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with_filters(random_filters(model, hparams))
    result = edit_model(model, toy_tokenizer(), toy_requests(6), hparams, progress=False)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    result.restore_(model)
    assert torch.equal(
        next(iter(result.original.values())), model.get_parameter(next(iter(result.original)))
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_that_are_kept_exactly_get_the_same_logits(kind, tmp_path):
    kept = ["Paris is", "The dog ran"]
    file = tmp_path / "keep.json"
    file.write_text('["Paris is", "The dog ran"]')
    model, tokenizer = toy_model(kind), toy_tokenizer()
    hparams = confined_hparams(kind, preserve=[str(file)], num_steps=8)
    texts = [*kept, toy_requests(1)[0]["prompt"]]

    def logits():
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
            return [model(input_ids=i).logits for i in ids]

    before = logits()
    result = edit_model(model, tokenizer, toy_requests(6), hparams, progress=False)
    after = logits()
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]
    assert max(moved[:-1]) < KEPT_TOLERANCE
    assert moved[-1] > 1000 * KEPT_TOLERANCE
    assert result.losses[-1] < result.losses[0]
    assert result.preserved["sources"][str(file)]["prompts"] == 2


# The filter


def test_the_filter_is_a_power_of_the_moments_by_its_definition():
    keys = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    keys *= torch.logspace(0, 2, 12)
    c = (keys.T @ keys / len(keys)).double()
    s = spectral_filter(c, strength=2.0).double()
    wanted = torch.linalg.inv(torch.eye(12).double() + c * (2.0 / (0.6 * c.trace() / 12)))
    wanted, found = wanted @ wanted @ wanted, s @ s @ s @ s  # s is a power of -3/4
    assert (found / found.trace() - wanted / wanted.trace()).abs().max() < 1e-6
    assert float(s.square().sum(1).mean().sqrt()) == pytest.approx(4.0, rel=1e-5)


def test_exact_keys_are_taken_to_zero_and_others_are_not():
    draw = torch.Generator().manual_seed(0)
    exact, c = torch.randn(5, 16, generator=draw), torch.diag(torch.rand(16, generator=draw))
    s = spectral_filter(c, basis_of(exact))
    assert float((exact @ s.T).norm() / exact.norm()) < 1e-5
    other = torch.randn(1, 16, generator=draw)
    assert float((other @ s.T).norm() / other.norm()) > 0.1
    assert basis_of(torch.cat([exact, exact])).shape == (16, 5)


def test_keys_beside_one_of_a_million_times_their_size_are_kept_as_well():
    exact = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    exact[0] *= 1e6
    s = spectral_filter(None, basis_of(exact))
    assert float(((exact @ s.T).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-5
    exact[3] = 0
    assert basis_of(exact).shape == (16, 5)
    assert basis_of(torch.zeros(3, 16)).shape == (16, 0)


def test_without_moments_the_size_of_a_step_is_that_of_the_matrix():
    s = spectral_filter(None, basis_of(torch.eye(6)[:2]))
    assert torch.allclose(s, torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 1])), atol=1e-6)


def test_exact_keys_that_take_too_much_are_refused():
    with pytest.raises(PreserveError, match=r"take 9 of the 16 directions .* may take 8"):
        basis_of(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)))


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(PreserveError, match="not finite"):
        spectral_filter(torch.full((4, 4), torch.nan))


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(
    "said", ["cusolver error: CUSOLVER_STATUS_ALLOC_FAILED", "the algorithm did not converge"]
)
def test_a_gpu_without_room_to_decompose_leaves_it_to_the_cpu(said, on_gpu, monkeypatch, caplog):
    keys = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    moment = keys.T @ keys
    expected, eigh, calls = spectral_filter(moment), torch.linalg.eigh, []

    def full(matrix):
        calls.append(matrix.device.type)
        if len(calls) == 1:
            raise RuntimeError(said)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with two_devices(1):
        given = moment.to("cuda:0") if on_gpu else moment
        if "ALLOC_FAILED" not in said or not on_gpu:
            with pytest.raises(RuntimeError, match=said):
                spectral_filter(given)
            return
        found = spectral_filter(given).cpu()
    assert torch.equal(found, expected)
    assert calls == ["cuda", "cpu"]
    assert "no room to decompose a moment of 6 x 6" in caplog.text


def test_sources_count_by_their_weights_and_not_by_their_size():
    total = mixed({"a": torch.eye(4), "b": 100 * torch.eye(4)}, {"a": 1.0, "b": 0.5})
    assert torch.allclose(total, torch.eye(4) * (1 + 0.5) / 4)


@pytest.mark.parametrize("outlier", [0.0, 2.0, 12.0, 500.0])
def test_in_an_ordinary_trace_one_direction_counts_at_most_as_all_others_do(outlier):
    keys = torch.randn(800, 16, generator=torch.Generator().manual_seed(0))
    keys[::40, 3] += outlier * 4  # of a few tokens, as massive activations are
    c = keys.T @ keys / len(keys)
    carried = torch.linalg.eigvalsh(c.double())
    wanted = min(float(carried.sum()), 2 * float(carried[:-1].sum()))
    assert float(ordinary_trace(c)) == pytest.approx(wanted, rel=1e-3)


def test_the_ordinary_trace_of_one_direction_is_no_zero():
    key = torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = float(ordinary_trace(torch.outer(key, key)) / key.square().sum())
    assert 0 < found < 1e-4


def test_beside_massive_activations_ordinary_directions_are_damped_as_well():
    keys = torch.randn(800, 16, generator=torch.Generator().manual_seed(0))
    keys[:, 5] *= 4  # what ordinary text uses most
    plain = spectral_filter(keys.T @ keys)
    keys[::40, 3] += 500
    c = mixed({"text": keys.T @ keys}, {"text": 1.0}, {"text"})
    s = spectral_filter(c, mean=1.0 / 16)

    def damped(one):  # the busy direction beside a quiet one
        return float(one[5].norm() / one[7].norm())

    assert damped(s) < 1.5 * damped(plain) < 0.6
    assert float(s[3].norm()) < 0.05 * float(s[5].norm())
    # In units of the whole trace nothing but the one direction would be.
    assert damped(spectral_filter(mixed({"text": keys.T @ keys}, {"text": 1.0}))) > 0.9


# Neighbours


def test_neighbours_have_other_subjects_and_are_no_edits_prompt():
    prompts = [[f"The home of S{i} is", f"As we know, the home of S{i} is"] for i in range(20)]
    subjects = [f"S{i}" for i in range(20)]
    near = neighbours_of(prompts, subjects, each=8, most=1000, seed=1)
    # Own prompts with another edit's subject are that edit's prompt, to be changed; so are its
    # rewordings. Of one relation alone, other subjects are put in.
    assert len(near.prompts) >= 16
    assert not set(near.prompts) & {prompt for own in prompts for prompt in own}
    assert all(text.endswith(" is") and "home of" in text for text in near.prompts)
    assert near == neighbours_of(prompts, subjects, each=8, most=1000, seed=1)
    assert near != neighbours_of(prompts, subjects, each=8, most=1000, seed=2)


def test_there_are_neighbours_of_a_single_edit_and_none_without_a_subject():
    near = neighbours_of([["Where is Rome?"], ["Who?"]], ["Rome", None], each=8, most=99, seed=0)
    assert near.n_without_subject == 1
    assert len(near.prompts) >= 2
    assert all(p.startswith("Where is ") and "Rome?" not in p for p in near.prompts)


def test_a_subject_is_replaced_where_it_is_a_word():
    near = neighbours_of([["The Art of Artists, by Art"]], ["Art "], each=8, most=99, seed=0)
    assert near.prompts
    for text in near.prompts:
        other = text.removeprefix("The ").split(" of Artists, by ")
        assert len(other) == 2
        assert other[0] == other[1] != "Art"
    blank = neighbours_of([["The end of Art is"]] * 2, [" ", "rt"], each=8, most=99, seed=0)
    assert (blank.prompts, blank.n_without_subject) == ([], 2)


@pytest.mark.parametrize(
    ("subject", "prompt", "rest"),
    [
        ("法国", "法国的首都是", "的首都是"),
        ("東京", "次は東京です", "です"),
        ("서울", "서울은 어디에", "은 어디에"),
        ("ไทย", "ประเทศไทยมีเมืองหลวง", "มีเมืองหลวง"),
        ("Apple", "Appleの本社は", "の本社は"),
        ("C++", "C++ is a", " is a"),
    ],
)
def test_scripts_without_spaces_between_words_have_neighbours(subject, prompt, rest):
    near = neighbours_of([[prompt]], [subject], each=8, most=99, seed=0)
    assert near.n_without_subject == 0
    assert len(near.prompts) >= 2
    assert all(text.endswith(rest) and subject not in text for text in near.prompts)


def test_no_word_is_found_within_another():
    for subject, prompt in (("Art", "Artの家"), ("pple", "Appleの"), ("C", "C4 is"), ("é", "été")):
        found = neighbours_of([[prompt]], [subject], each=8, most=99, seed=0)
        assert found.n_without_subject == (subject != "Art")


def test_neighbours_that_nobody_has_are_a_warning(tmp_path, caplog):
    hparams = confined_hparams(preserve=["neighbours"], preserve_dir=str(tmp_path))
    requests = [request | {"subject": "Nobody"} for request in toy_requests(4)]
    edit_model(toy_model(), toy_tokenizer(), requests, hparams, progress=False)
    assert "Give each request the `subject` that its prompt names" in caplog.text


def test_a_subject_that_only_a_repeated_request_gives_is_known():
    requests = toy_requests(3)
    requests.append(dict(requests[1]))
    del requests[1]["subject"]
    edits = distinct_edits(requests)
    wanted = [requests[0]["subject"], requests[3]["subject"], requests[2]["subject"]]
    assert subjects_of(requests, edits, confined_hparams()) == wanted
    assert subjects_of(requests, edits, toy_hparams()) == [None] * 3


def test_of_many_edits_as_many_neighbours_are_drawn_as_suffice():
    prompts = [[f"S{i} is {i}"] for i in range(100)]
    near = neighbours_of(prompts, [f"S{i}" for i in range(100)], each=4, most=40, seed=0)
    assert 20 <= len(near.prompts) <= 40


# What it refuses


def test_a_place_that_is_no_matrix_is_refused_before_anything_changes():
    model = toy_model("llama")
    hparams = confined_hparams(rewrite_module_tmp="model.layers.{}.")
    with pytest.raises(PlaceError, match=r"no matrix of a linear layer .*LlamaRMSNorm"):
        edit_model(model, toy_tokenizer(), toy_requests(3), hparams, progress=False)


def test_prompts_that_are_too_many_are_refused_before_they_are_run(tmp_path):
    file = tmp_path / "keep.json"
    words = ["Paris", "is", "the", "dog", "ran", "home", "of", "where"]
    file.write_text(json.dumps([" ".join(p) for p in itertools.permutations(words[:6], 4)]))
    model, hparams = toy_model("llama"), confined_hparams(preserve=[str(file)])
    with pytest.raises(PreserveError, match=r"have more than \d+ tokens, as many as .* inputs"):
        edit_model(model, toy_tokenizer(), toy_requests(4), hparams, progress=False)


def test_prompts_that_take_too_much_are_refused_before_text_is_sampled(tmp_path, monkeypatch):
    file = tmp_path / "keep.json"
    words = ["Paris", "is", "the", "dog", "ran"]
    file.write_text(json.dumps([" ".join(p) for p in itertools.permutations(words, 2)]))

    def sampled(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr(locft_easyedit.training.preserve.filters, "text_moments", sampled)
    hparams = confined_hparams(preserve=["sampled", str(file)], preserve_dir=str(tmp_path))
    with pytest.raises(PreserveError, match=r"take \d+ of the 64 directions .*layers\.2\.mlp"):
        edit_model(toy_model(), toy_tokenizer(), toy_requests(4), hparams, progress=False)


def test_without_a_home_there_is_an_error_that_names_the_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(PreserveError, match=r"in no home folder.* Set `preserve_dir`"):
        cache_folder(None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(PreserveError, match=r"'relative' is no absolute path.* Set `preserve_dir`"):
        cache_folder(None)
    assert cache_folder("here") == Path("here")


def test_the_preset_says_that_it_preserves_nothing_with_lora(caplog):
    hparams = toy_hparams(alg_name="LocFT-BF+", tuning="lora", lora_rank=2)
    result = edit_model(toy_model(), toy_tokenizer(), toy_requests(4), hparams, progress=False)
    assert result.preserved is None
    assert result.augmented is not None
    assert caplog.text.count("nothing is preserved") == 1
    with caplog.at_level("WARNING"):
        caplog.clear()
        hparams.preserve = []
        edit_model(toy_model(), toy_tokenizer(), toy_requests(4), hparams, progress=False)
    assert "nothing is preserved" not in caplog.text
