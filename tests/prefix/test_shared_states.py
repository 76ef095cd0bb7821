"""States recorded once for every place: the same numbers, and no frozen layer runs again."""

import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.errors import OutputError, PlaceError
from locft_easyedit.evaluation import predictions as choices
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut
from locft_easyedit.prefix.frozen_prefix import FrozenPrefix, Layout
from locft_easyedit.prefix.shared_states import SharedStates, UnchangedLayers
from locft_easyedit.prefix.shortcuts import find_shortcuts
from locft_easyedit.prefix.state_file import StateFile
from locft_easyedit.prefix.store import Budget, StateStore
from locft_easyedit.training.session import EditSession

pytestmark = pytest.mark.usefixtures("short_answers")

# Side by side attention and MLP (GPT-J) leave no cut at the MLP's norm.
CASES = [
    (kind, cut)
    for kind in ("llama", "gpt2", "gptj", "gemma3", "mixtral")
    for cut in ("matrix", "mlp", "layer")
    if (kind, cut) not in {("gptj", "mlp"), ("mixtral", "matrix")}
]
NOTHING = Budget(host_gib=0.0, disk_gib=0.0)


def session(kind="llama", layer=2, *, model, states=None, template=None, n=6, **changes):
    hparams = toy_hparams(
        layers=[layer],
        rewrite_module_tmp=template or DOWN_PROJECTION[kind],
        health_check=False,
        eval_batch_size=4,
        **changes,
    )
    return EditSession(
        model, toy_tokenizer(), toy_requests(n), hparams, progress=False, states=states
    )


def records_with_lists(n):
    """Returns requests with questions of two prompts; the shorter begins at a later position."""
    records = toy_requests(n)
    for record in records:
        record["locality"]["many"] = {
            "prompt": ["The river is", f"Once more, the river near {record['subject']} is the"],
            "ground_truth": ["Rhine", "Loire and the Rhine"],
        }
    return records


def recorded(prefix):
    return prefix.store.get(torch.arange(prefix.n_tokens))


def as_json(metrics):
    return json.dumps(metrics, sort_keys=True)


@contextmanager
def counted(model):
    """Counts the calls of each layer; those of its stand-ins are none."""
    calls = Counter()
    layers = find_layers(model).layers
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: calls.update([i]))
        for i, layer in enumerate(layers)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.fixture
def not_close(monkeypatch):
    """No text is run in another form because two tokens are close."""
    never = torch.tensor(False)
    monkeypatch.setattr(choices, "too_close", lambda best, model: never.expand(len(best)))


def small_texts(n=6, seed=0):
    numbers = np.random.default_rng(seed)
    lists = [numbers.integers(3, 200, size).tolist() for size in numbers.integers(3, 12, n)]
    return TokenizedTexts.from_lists(lists, [2] * n)


def empty_prefix(model, layer, texts, budget=None):
    cut = layer_cut(find_layers(model), layer)
    return FrozenPrefix(model, cut, int(texts.input_offsets[-1]), budget)


def fill(states, prefix, texts, **changes):
    return states.fill(prefix, *laid_out(texts, **changes))


def laid_out(texts, *, batch_size=3, row_tokens=24, packed=True, first_position=None):
    """Returns texts in rows, and the batch size, as prefixes are recorded."""
    return Layout(texts, row_tokens, packed, first_position), batch_size


# Equal to what each place finds by itself


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_training_is_the_same_to_the_last_bit(kind, cut, packing):
    model = toy_model(kind)
    how = {"packing": packing, "prefix_cut": cut, "num_steps": 2}
    with SharedStates(model, [0, 2, 3]) as states:
        for layer in (2, 0, 3):
            with session(kind, layer, model=model, **how) as own:
                expected, plain = recorded(own._runner.prefix), own.train_()
            plain.restore_(model)
            with session(kind, layer, model=model, states=states, **how) as lent:
                prefix = lent._runner.prefix
                assert prefix.complete
                assert prefix.cut.kind == cut
                assert torch.equal(recorded(prefix), expected)
                shared = lent.train_()
            shared.restore_(model)
            assert shared.packed == plain.packed == packing
            assert shared.step_losses == plain.step_losses
            assert all(torch.equal(shared.new[name], plain.new[name]) for name in plain.new)
        assert states.n_passes == 1


@pytest.mark.parametrize(
    ("kind", "packing"), [("llama", True), ("gpt2", False), ("gptj", True), ("gemma3", False)]
)
def test_metrics_are_the_same(kind, packing):
    """Also where the first measurement is the one after the edit."""
    model = toy_model(kind)
    with SharedStates(model, [2, 3]) as states:
        for layer, template in ((3, None), (2, layer_template(kind))):
            found = []
            for lender in (None, states):
                with session(
                    kind, layer, model=model, states=lender, template=template, packing=packing, n=3
                ) as one:
                    how = EvalConfig.from_session(one, progress=False)
                    evaluation = Evaluation(
                        model, toy_tokenizer(), records_with_lists(3), how, metrics=PLAIN_METRICS
                    )
                    result = one.train_()
                    found.append(as_json(evaluation.measure()))
                    result.restore_(model)
            assert found[0] == found[1]
        # The edits, the teacher-forced prompts, and the prompts with a draft of their answer.
        assert states.n_passes == 3


def layer_template(kind):
    return DOWN_PROJECTION[kind].split("{}")[0] + "{}."


# What runs


def test_the_second_place_runs_no_frozen_layer(not_close, monkeypatch):
    model = toy_model()
    down, whole = DOWN_PROJECTION["llama"], layer_template("llama")
    places = [(1, down), (3, down), (2, down), (2, whole)]
    with SharedStates(model, [1, 2, 3]) as states, counted(model) as calls:

        def probing(*args, **options):
            found = find_shortcuts(*args, **options)
            calls.clear()  # it runs a few texts with and without each shortcut
            return found

        monkeypatch.setattr("locft_easyedit.prefix.shortcuts.find_shortcuts", probing)
        # It runs one text through all layers, once for each place.
        monkeypatch.setattr("locft_easyedit.training.session.check_dependence", lambda *_: None)
        for number, (layer, template) in enumerate(places):
            with session(layer=layer, model=model, states=states, template=template) as one:
                how = EvalConfig.from_session(one, progress=False)
                evaluation = Evaluation(
                    model, toy_tokenizer(), one.requests, how, metrics=["accuracy"]
                )
                result = one.train_()
                evaluation.measure("after")
            result.restore_(model)
            below = {i for i in calls if i < layer}
            assert below == (set() if number else {0})
            assert states.n_passes == 2


def test_generated_answers_begin_from_the_recorded_states(not_close):
    """Word by word the whole model runs; drafts are checked from the states."""
    model = toy_model()
    with SharedStates(model, [2, 3]) as states:
        with session(layer=2, model=model, states=states) as one:
            how = EvalConfig.from_session(one, progress=False)
            Evaluation(model, toy_tokenizer(), one.requests, how, metrics=PLAIN_METRICS)
        with session(layer=3, model=model, states=states) as one:
            how = EvalConfig.from_session(one, progress=False)
            evaluation = Evaluation(
                model, toy_tokenizer(), one.requests, how, metrics=PLAIN_METRICS
            )
            decoder = evaluation._generated._decoder
            with counted(model) as calls:
                decoder._choices.take("")
        assert states.n_passes == 3
    assert not calls.keys() & {0, 1, 2}
    assert decoder._choices._prefix.complete


def test_a_cut_inside_a_layer_runs_that_layer_alone():
    model = toy_model()
    with SharedStates(model, [1, 3]) as states:
        with session(layer=1, model=model, states=states):
            pass
        with session(layer=3, model=model) as plain:
            cuts = {cut.kind: cut for cut in plain.shortcuts.cuts}
            texts = plain._texts
        for kind, calls_of_attention in (("matrix", 2), ("mlp", 2), ("layer", 0)):
            prefix = FrozenPrefix(model, cuts[kind], int(texts.input_offsets[-1]))
            attention = []
            hook = model.model.layers[3].self_attn.register_forward_hook(
                lambda *_, seen=attention: seen.append(1)
            )
            with counted(model) as calls:
                assert fill(states, prefix, texts, batch_size=4, row_tokens=64)
            hook.remove()
            assert not calls.keys() & {0, 1, 2}
            assert len(attention) == calls_of_attention  # 6 texts in batches of 4
        assert states.n_passes == 1


def test_texts_are_told_apart_by_content():
    model, texts, other = toy_model(), small_texts(), small_texts(seed=1)
    shifted = np.full(len(texts), 5)
    with SharedStates(model, [1, 2]) as states:
        for layer in (1, 2):
            for each in (texts, small_texts(), other):
                assert fill(states, empty_prefix(model, layer, each), each)
        assert states.n_passes == 2
        moved = empty_prefix(model, 2, texts)
        assert fill(states, moved, texts, first_position=shifted)
        assert states.n_passes == 3
        assert fill(states, empty_prefix(model, 1, texts), texts, packed=False)
        assert states.n_passes == 4
        n_tokens = 3 * int(texts.input_offsets[-1]) + int(other.input_offsets[-1])
        assert sum(states._budget.taken) == n_tokens * 2 * 32 * 4


def test_positions_of_first_tokens_count():
    model, texts = toy_model("gpt2"), small_texts()
    with SharedStates(model, [1]) as states:
        plain, moved = (empty_prefix(model, 1, texts) for _ in range(2))
        assert fill(states, plain, texts)
        assert fill(states, moved, texts, first_position=np.arange(len(texts)))
        n = int(texts.input_lengths[0])  # the first text is where it was
        assert torch.allclose(recorded(plain)[:n], recorded(moved)[:n], atol=1e-5)
        assert not torch.allclose(recorded(plain)[n:], recorded(moved)[n:], atol=1e-2)


@pytest.mark.parametrize("kind", ["matrix", "mlp", "layer"])
def test_positions_of_first_tokens_reach_the_layer_that_runs_alone(kind):
    model = toy_model()
    with session(model=model) as plain:
        [cut] = [cut for cut in plain.shortcuts.cuts if cut.kind == kind]
    texts, positions = small_texts(12), 7 * np.arange(12)
    layout = {"batch_size": 12, "first_position": positions}
    own, filled = (FrozenPrefix(model, cut, int(texts.input_offsets[-1])) for _ in range(2))
    own.record(*laid_out(texts, **layout))
    with SharedStates(model, [2, 3]) as states:
        assert fill(states, filled, texts, **layout)
        assert torch.equal(recorded(filled), recorded(own))


# Who owns what


def test_borrowed_states_outlive_the_borrower():
    model, texts = toy_model(), small_texts()
    with SharedStates(model, [1, 2]) as states:
        first, second = (empty_prefix(model, 2, texts) for _ in range(2))
        assert fill(states, first, texts)
        before = recorded(first).clone()
        first.close()
        assert fill(states, second, texts)
        assert second.store is first.store
        assert torch.equal(recorded(second), before)
        assert first.budget.taken == [0, 0, 0]
        assert states._budget.taken != [0, 0, 0]
    assert states._budget.taken == [0, 0, 0]


def test_own_states_are_given_back():
    model, texts = toy_model(), small_texts()
    prefix = empty_prefix(model, 2, texts)
    prefix.record(*laid_out(texts))
    assert prefix.budget.taken[1]
    prefix.close()
    assert prefix.budget.taken == [0, 0, 0]


def test_choices_give_back_what_is_theirs_alone():
    model = toy_model()
    with SharedStates(model, [2]) as states:
        template = "model.layers.{}.self_attn.o_proj"  # only a cut at the layer
        for tried in range(2):
            with session(model=model, states=states, template=template) as one:
                how = EvalConfig.from_session(one, progress=False)
                evaluation = Evaluation(
                    model, toy_tokenizer(), one.requests, how, metrics=["accuracy"]
                )
                assert how.frozen.kind == "layer"
                evaluation.measure()
                evaluation._accuracy._choices.close()
            assert states.n_passes == 2, tried


# Where it is not used


def test_too_small_a_budget_is_said_once_and_nothing_else_changes(caplog):
    model = toy_model()
    with session(model=model) as own:
        expected = own.train_()
    expected.restore_(model)
    states = SharedStates(model, [1, 2, 3], NOTHING)
    for layer in (2, 2, 3):
        with session(layer=layer, model=model, states=states) as one:
            how = EvalConfig.from_session(one, progress=False)
            evaluation = Evaluation(
                model, toy_tokenizer(), one.requests, how, metrics=PLAIN_METRICS
            )
            assert not evaluation._accuracy._choices._prefix.complete
            assert one._runner.prefix.complete
            found = one.train_()
        found.restore_(model)
        if layer == 2:
            assert found.step_losses == expected.step_losses
    [warning] = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "The states that enter 3 layers cannot be kept" in warning
    assert "each place computes its own" in warning
    assert states.n_passes == 3  # tried once for each set of texts


def test_a_budget_for_one_layer_is_not_taken_for_three():
    model, texts = toy_model(), small_texts()
    one = int(texts.input_offsets[-1]) * 32 * 4 / 2**30
    for n_layers, fits in ((2, False), (3, True)):
        budget = Budget(host_gib=n_layers * one, disk_gib=0.0)
        with SharedStates(model, [1, 2, 3], budget) as states:
            assert fill(states, empty_prefix(model, 2, texts), texts) is fits
            taken = [0, round(3 * one * 2**30), 0] if fits else [0, 0, 0]
            assert states._budget.taken == taken


def test_states_that_memory_cannot_hold_go_to_the_disk(tmp_path):
    model, texts = toy_model(), small_texts()
    budget = Budget(host_gib=0.0, folder=str(tmp_path))
    with SharedStates(model, [1, 2], budget) as states:
        prefix, own = (empty_prefix(model, 2, texts) for _ in range(2))
        assert fill(states, prefix, texts)
        own.record(*laid_out(texts))
        assert prefix.store.file is not None
        assert torch.equal(recorded(prefix), recorded(own))


def test_a_full_disk_falls_back(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OutputError("no space left")

    model, texts = toy_model(), small_texts()
    budget = Budget(host_gib=0.0, folder=str(tmp_path))
    with SharedStates(model, [1, 2], budget) as states:
        monkeypatch.setattr(StateFile, "put", full)
        assert not fill(states, empty_prefix(model, 2, texts), texts)
        assert states._budget.taken == [0, 0, 0]
    assert "no space left" in caplog.text


def test_a_prefix_that_finds_no_room_is_left_empty():
    model = toy_model()
    with session(model=model) as plain:
        [cut] = [cut for cut in plain.shortcuts.cuts if cut.kind == "matrix"]
        texts = plain._texts
    prefix = FrozenPrefix(model, cut, int(texts.input_offsets[-1]), NOTHING)
    with SharedStates(model, [2]) as states:
        assert not fill(states, prefix, texts)
    assert not prefix.complete
    with pytest.raises(RuntimeError, match="Nothing was recorded yet"):
        _ = prefix.store


def test_a_prefix_whose_disk_is_full_can_be_recorded_later(tmp_path, monkeypatch):
    def full(*args):
        raise OutputError("no space left")

    model = toy_model()
    with session(model=model) as plain:
        [cut] = [cut for cut in plain.shortcuts.cuts if cut.kind == "matrix"]
        texts = plain._texts
    budget = Budget(host_gib=0.0, folder=str(tmp_path))
    prefix = FrozenPrefix(model, cut, int(texts.input_offsets[-1]), budget)
    with SharedStates(model, [2]) as states:
        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "put", full)
            assert not fill(states, prefix, texts)
        assert budget.taken == [0, 0, 0]
        assert fill(states, prefix, texts)
        assert torch.isfinite(recorded(prefix)).all()


def test_what_was_begun_is_forgotten_when_it_fails(monkeypatch):
    model = toy_model()
    texts = small_texts()
    put = StateStore.put
    calls = []

    def failing(self, where, values):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(self, where, values)

    with SharedStates(model, [1, 2]) as states:
        monkeypatch.setattr(StateStore, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            fill(states, empty_prefix(model, 2, texts), texts)
        assert states._budget.taken == [0, 0, 0]
        assert fill(states, empty_prefix(model, 2, texts), texts)
        assert states.n_passes == 2


def test_other_layers_and_other_models_are_not_served():
    model, texts = toy_model(), small_texts()
    with SharedStates(model, [1, 3]) as states:
        assert not fill(states, empty_prefix(model, 2, texts), texts)
        other = toy_model()
        assert not fill(states, empty_prefix(other, 1, texts), texts)
        assert states.n_passes == 0
        none = TokenizedTexts.from_lists([], [])
        assert not fill(states, empty_prefix(model, 1, none), none)


def test_a_model_that_cannot_be_split_runs_whole():
    model = toy_model()
    with SharedStates(model, [2]) as states:
        with session(model=model, states=states, frozen_prefix=False) as one:
            assert not one.shortcuts.cuts
            assert one._runner.prefix is None
            assert one.shared_states is None
            assert EvalConfig.from_session(one, progress=False).states is None
        assert states.n_passes == 0


def test_no_layer_list_no_states():
    model = toy_model()
    texts, prefix = small_texts(), empty_prefix(model, 1, small_texts())
    model.config.num_hidden_layers = 7
    with SharedStates(model, [1]) as states:
        assert not fill(states, prefix, texts)


def test_layers_that_the_model_lacks():
    with pytest.raises(PlaceError, match=r"`layers=\[-1, 4\]` .* 4 layers \(0 to 3\)"):
        SharedStates(toy_model(), [4, 1, -1])


# A model that was edited meanwhile


@torch.no_grad()
def edit_(model, layer):
    model.model.layers[layer].mlp.down_proj.weight.mul_(1.5)


def test_after_an_edit_only_what_lies_below_it_is_recorded():
    model, texts = toy_model(), small_texts()
    expected = {}
    for layer in (1, 2, 3):
        prefix = empty_prefix(model, layer, texts)
        prefix.record(*laid_out(texts))
        expected[layer] = recorded(prefix)
    with SharedStates(model, [1, 2, 3]) as states:
        original = {name: value.clone() for name, value in model.state_dict().items()}
        edit_(model, 2)
        assert not fill(states, empty_prefix(model, 3, texts), texts)
        at_2 = empty_prefix(model, 2, texts)
        assert fill(states, at_2, texts)
        assert torch.equal(recorded(at_2), expected[2])
        edit_(model, 0)
        assert not fill(states, empty_prefix(model, 2, texts), texts)
        model.load_state_dict(original)
        for layer in (1, 2, 3):
            prefix = empty_prefix(model, layer, texts)
            assert fill(states, prefix, texts)
            assert torch.equal(recorded(prefix), expected[layer])
        assert states.n_passes == 2


def test_up_to_where_a_model_is_intact():
    model = toy_model()
    intact = UnchangedLayers(model, find_layers(model), 3)
    assert intact.highest_unchanged_layer() == 3
    edit_(model, 3)
    assert intact.highest_unchanged_layer() == 3
    edit_(model, 1)
    assert intact.highest_unchanged_layer() == 1
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    assert intact.highest_unchanged_layer() == -1


# Surroundings


def test_recorded_in_evaluation_mode_outside_of_inference_mode():
    model, texts = toy_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), small_texts()
    first = empty_prefix(model, 2, texts)
    with SharedStates(model, [2]) as states:
        fill(states, first, texts)
        expected = recorded(first)
    model.train()
    with SharedStates(model, [2]) as states, torch.inference_mode():
        fill(states, again := empty_prefix(model, 2, texts), texts)
        assert not again.store._host.is_inference()
        assert torch.equal(recorded(again), expected)
        assert model.training


def test_a_budget_that_is_left_open_gets_a_size_once(monkeypatch):
    model, texts = toy_model(), small_texts()
    one = int(texts.input_offsets[-1]) * 32 * 4
    monkeypatch.setattr("locft_easyedit.prefix.store.free_host_memory", lambda: 2 * one)
    # Half of what is free: one layer of three; taken anew each time it would be all three.
    budget = Budget(disk_gib=0.0)
    with SharedStates(model, [1, 2, 3], budget) as states:
        assert not fill(states, empty_prefix(model, 1, texts), texts)
    with SharedStates(model, [1], budget) as states:
        assert fill(states, empty_prefix(model, 1, texts), texts)
