"""A model spread over two GPUs against the same model on one; see `two_devices`."""

import logging

import pytest
import torch
from accelerate import dispatch_model
from helpers.toys import (
    DOWN_PROJECTION,
    HIDDEN,
    N_LAYERS,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from helpers.two_devices import two_devices

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.delta.delta import Delta
from locft_easyedit.easyedit import chat
from locft_easyedit.errors import PlaceError
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.locate.sensitivity import sensitivities
from locft_easyedit.modeling.devices import module_device
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.shared_states import SharedStates
from locft_easyedit.training.session import EditSession

pytestmark = pytest.mark.usefixtures("short_answers")
METRICS = ("accuracy", "generated")
GPUS = [torch.device("cuda", i) for i in range(2)]
_ENDS = {"gpt2": (["transformer.wte", "transformer.wpe"], ["transformer.ln_f"])}


@pytest.fixture
def gpus():
    """Two GPUs for a test."""
    with two_devices() as pretended:
        yield pretended


def spread(model, split, **more):
    """Dispatches a model: its layers from `split` up, and what follows them, are on the second."""
    kind = "gpt2" if hasattr(model, "transformer") else "llama"
    below, above = _ENDS.get(kind, (["model.embed_tokens"], ["model.norm", "model.rotary_emb"]))
    stack = find_layers(model).path
    places = dict.fromkeys(below, "cuda:0") | dict.fromkeys(above, "cuda:1")
    places |= {f"{stack}.{i}": f"cuda:{int(i >= split)}" for i in range(N_LAYERS)}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    places["lm_head"] = "cuda:0" if tied else "cuda:1"
    places |= more
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, places, main_device="cuda:0", skip_keys=skipped)


def made(kind="llama", split=None, **config):
    """Returns a toy on the first GPU; with `split`, spread over both."""
    model = toy_model(kind, **config)
    return model.to("cuda:0") if split is None else spread(model, split)


def hparams(kind="llama", **changes):
    values = {"rewrite_module_tmp": DOWN_PROJECTION[kind], "dtype": "float32", "batch_size": 3}
    return toy_hparams(**(values | {"num_steps": 2} | changes))


def run(model, h, metrics=()):
    """Returns what an edit, and the measurements around it if there are any, find."""
    requests, tokenizer = toy_requests(4), toy_tokenizer()
    # A model that is not whole on one GPU runs each product for itself.
    with EditSession(model, tokenizer, requests, h, progress=False, fused=False) as session:
        measured = []
        if metrics:
            how = EvalConfig.from_session(session, progress=False)
            evaluation = Evaluation(model, tokenizer, requests, how, metrics=metrics)
            before = evaluation.measure("before")
        result = session.train_()
        if metrics:
            measured = list(PairedMetrics(requests, before, evaluation.measure("after")))
        found = session.shortcuts
        prefix = session._runner.prefix
        if prefix is not None:
            # States lie where they are used: no step moves them.
            stack = session.place.stack.layers
            assert prefix.store.device == module_device(stack[session.place.first_layer])
        shortcuts = ([c.kind for c in found.cuts], found.tail is None, found.head is None)
    return result, measured, shortcuts, model


def assert_same(spread_run, run_on_one):
    (result, metrics, shortcuts, model), (expected, *rest, _) = spread_run, run_on_one
    assert {p.device for p in model.parameters() if not p.is_meta} == set(GPUS)
    assert [metrics, shortcuts] == rest
    assert result.step_losses == expected.step_losses
    assert result.n_updates == expected.n_updates > 0
    parameters = dict(model.named_parameters())
    for name, value in expected.new.items():
        assert not torch.equal(value, expected.original[name])
        where = parameters[name].device
        for found in (result.original, result.new):
            assert found[name].device == where
        assert torch.equal(result.new[name].cpu(), value.cpu())
        assert torch.equal(parameters[name].cpu(), value.cpu())
    assert result.health.to_dict() == expected.health.to_dict()
    assert not result.health.not_measured
    result.restore_(model)
    for name, value in expected.original.items():
        assert torch.equal(parameters[name].cpu(), value.cpu())


def test_products_are_fused_on_one_gpu_alone(gpus):
    for split in (None, 2):
        h = hparams(layers=[1])
        with EditSession(made(split=split), toy_tokenizer(), toy_requests(4), h, False) as session:
            assert (session.shortcuts.fused is None) is (split is not None)


# The edited layer is below the border, at it from either side, and above it.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_where_the_border_is_changes_nothing(kind, gpus):
    expected = run(made(kind), hparams(kind), METRICS)
    for split in range(1, N_LAYERS):
        assert_same(run(made(kind, split), hparams(kind), METRICS), expected)


@pytest.mark.parametrize(
    ("split", "changes"),
    [
        (2, {"prefix_cut": "matrix"}),
        (2, {"prefix_cut": "mlp"}),
        (2, {"prefix_cut": "layer"}),
        (2, {"layers": [1, 2]}),
        (3, {"layers": [0, 3]}),
        (2, {"layers": [1, 2], "rewrite_module_tmp": "model.layers.{}."}),
        (3, {"layers": [3]}),
        (2, {"packing": False}),
        (2, {"frozen_prefix": False}),
        (2, {"prefix_gpu_gib": 0.0}),
        (2, {"prefix_gpu_gib": 5e-6}),
        (3, {"micro_batch_size": 2, "layers": [2, 3]}),
        (2, {"tuning": "lora", "lora_rank": 4}),
        (2, {"tuning": "lora", "layers": [1, 2], "frozen_prefix": False}),
        (2, {"batch_loss_threshold": 5.9, "layers": [1, 2]}),
    ],
    ids=str,
)
def test_every_place_and_way_to_train(split, changes, gpus):
    h = hparams(**changes)
    assert_same(run(made(split=split), h), run(made(), h))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_embeddings(kind, gpus):
    expected = run(made(kind, tie_word_embeddings=True), hparams(kind), METRICS)
    model = made(kind, 2, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(run(model, hparams(kind), METRICS), expected)


def test_all_other_metrics(gpus):
    pytest.importorskip("nltk")
    found = []
    for split in (None, 2):
        model = made(split=split)
        metrics = ("ppl", "fluency")
        evaluation = Evaluation(model, toy_tokenizer(), toy_requests(2), metrics=metrics)
        found.append(evaluation.measure())
    assert found[0] == found[1]


# What crosses between the GPUs


@pytest.mark.parametrize("cut", ["matrix", "layer"])
def test_no_step_moves_the_recorded_states(cut, gpus):
    """The place is on the second GPU, the input on the first."""
    model = spread(toy_model(), 2, **{"model.rotary_emb": "cuda:0"})  # as `load_model` has it
    tokenizer = toy_tokenizer()
    h = hparams(num_steps=3, prefix_cut=cut, health_check=False)
    with EditSession(model, tokenizer, toy_requests(8), h, progress=False) as session:
        gpus.crossings.clear()
        result = session.train_()
        store = session._runner.prefix.store
        between = ["cuda:0", "cuda:1"]
        moved = [c[2:] for c in gpus.crossings if sorted(c[:2]) == between]
    assert store.device == GPUS[1]
    # Positions, masks and rotary angles of the rows: far less than the states, three times over.
    assert len(result.losses) == 3
    assert moved
    assert not [shape for dtype, shape in moved if dtype.is_floating_point and shape[-1] == HIDDEN]


def test_the_next_batch_is_made_on_streams_of_both(gpus, monkeypatch):
    streams = []
    made_by = torch.cuda.Stream

    def stream(device=None, **kwargs):
        streams.append(device)
        return made_by(device)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    edit_model(
        made(split=2), toy_tokenizer(), toy_requests(3), hparams(num_steps=3), progress=False
    )
    # Of three epochs: a new one each would strand what the last had fetched.
    assert sorted(streams, key=str) == list(GPUS)


# What else reads the model


def test_edits_are_put_in_and_taken_out(gpus):
    model = made(split=2)
    h = hparams(layers=[1, 2])
    result = edit_model(model, toy_tokenizer(), toy_requests(4), h, progress=False)
    delta = Delta.from_result(result, model, h)
    edited = {name: value.clone() for name, value in result.new.items()}
    parameters = dict(model.named_parameters())
    delta.revert_(model)
    assert all(torch.equal(parameters[n], v) for n, v in result.original.items())
    delta.apply_(model)
    assert all(torch.equal(parameters[n], v) for n, v in edited.items())
    with result.switched_off(model):
        assert all(torch.equal(parameters[n], v) for n, v in result.original.items())
    assert all(torch.equal(parameters[n], v) for n, v in edited.items())


def test_a_checkpoint_goes_on(gpus, tmp_path, monkeypatch):
    h = hparams(layers=[1, 2], num_steps=3, checkpoint_dir=str(tmp_path), checkpoint_minutes=0)
    plain = hparams(layers=[1, 2], num_steps=3)
    expected = edit_model(made(split=2), toy_tokenizer(), toy_requests(6), plain, progress=False)
    step, calls = torch.optim.Adam.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt("in the middle")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    model = made(split=2)
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        edit_model(model, toy_tokenizer(), toy_requests(6), h, progress=False)
    n_before = len(calls)
    result = edit_model(model, toy_tokenizer(), toy_requests(6), h, progress=False)
    assert 0 < len(calls) - n_before < 6  # of two mini-batches in three epochs
    assert result.step_losses == expected.step_losses
    assert all(torch.equal(result.new[n], expected.new[n]) for n in expected.new)


def test_a_prefix_of_an_earlier_run(gpus, tmp_path, caplog):
    h = hparams(prefix_dir=str(tmp_path))
    expected = run(made(), hparams())
    assert_same(run(made(split=2), h), expected)
    with caplog.at_level(logging.INFO, logger="locft_easyedit"):
        assert_same(run(made(split=2), h), expected)
    assert "The prefix of an earlier run is used" in caplog.text


@pytest.mark.parametrize("layers", [[1], [2], [3]])
def test_states_that_places_share(layers, gpus):
    found = []
    for split in (None, 2):
        model, tokenizer = made(split=split), toy_tokenizer()
        with SharedStates(model, [1, 2, 3]) as states:
            session = EditSession(
                model, tokenizer, toy_requests(4), hparams(layers=layers), False, states=states,
                fused=False,
            )  # fmt: skip
            with session:
                found.append(session.train_())
            assert states.n_passes == 1
            stores = next(iter(states._stores.values()))
            stack = find_layers(model).layers
            assert all(store.device == module_device(stack[i]) for i, store in stores.items())
    assert found[0].step_losses == found[1].step_losses


def test_sensitivities(gpus):
    texts = tokenize_edits(toy_tokenizer(), distinct_edits(toy_requests(6)).edits)
    found = []
    for split in (None, 2):
        model = made(split=split)
        found.append(sensitivities(model, find_layers(model), texts, texts, texts, packed=True))
    assert found[0] == found[1]
    assert len(found[0]) == 7 * N_LAYERS


# EasyEdit's editor


@pytest.mark.parametrize("given", ["pair", "name"])
def test_the_editor(given, easyedit, gpus, tmp_path, monkeypatch):
    """As its users have it: `device: 0` and `model_parallel: true`."""
    monkeypatch.setattr(chat, "_MAX_NEW_TOKENS", 4)
    tokenizer = toy_tokenizer(pad_is_eos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    toy_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = {"prompts": ["The river is", "It lies in"], "target_new": ["the Rhine", "Peru"]}
    found = []
    for model_parallel in (False, True):
        name = (made(split=2 if model_parallel else None), tokenizer)
        h = hparams(
            model_name=name if given == "pair" else str(tmp_path),
            device=0,
            model_parallel=model_parallel,
        )
        editor = easyedit.BaseEditor.from_hparams(h)
        places = {parameter.device for parameter in editor.model.parameters()}
        assert places == set(GPUS[: 1 + model_parallel])
        assert editor.device == GPUS[0]
        together, _, _ = editor.batch_edit(**arguments, verbose=False)
        alone, model, former = editor.edit(**arguments, verbose=False)
        for entry in together:
            del entry["time"]
        answers = [chat._ask(editor._measures(chat.ChatMeasures, False, False), "Where?")]
        with editor.unedited():
            original = {name: p.cpu().clone() for name, p in model.named_parameters()}
        found.append((together, alone, answers, {k: v.cpu().tolist() for k, v in former.items()}))
        assert all(torch.equal(original[k], v) for k, v in toy_model().named_parameters())
    assert found[0] == found[1]


def test_a_model_in_which_some_weights_are_not_loaded(tmp_path):
    """accelerate puts what GPUs have no room for on the host, and loads it in every pass."""
    model = toy_model()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(N_LAYERS)}
    places["model.rotary_emb"] = "cpu"
    model = dispatch_model(model, places, offload_dir=tmp_path)
    with pytest.raises(PlaceError, match=r"layers\.2\.mlp.* is not loaded"):
        edit_model(model, toy_tokenizer(), toy_requests(4), toy_hparams(), progress=False)
    # One above the place is read in every pass.
    h = toy_hparams(layers=[1])
    result = edit_model(model, toy_tokenizer(), toy_requests(4), h, progress=False)
    expected = edit_model(toy_model(), toy_tokenizer(), toy_requests(4), h, progress=False)
    assert result.step_losses == expected.step_losses
    assert result.frozen_prefix
