import json
import logging
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from cli.test_edit import run
from helpers.scripts import script_module
from helpers.toys import (
    REPOSITORY,
    loaded_hparams,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.api import edit_and_measure, edit_model, open_session, write_run
from locft_easyedit.cli import edit
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.tokenization import TokenizedTexts, tokenize_edits
from locft_easyedit.delta.delta import Delta
from locft_easyedit.errors import (
    CheckpointError,
    HyperParamsError,
    ModelError,
    NonFiniteLossError,
    PlaceError,
    RequestError,
)
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.locate import auto, trial
from locft_easyedit.locate import auto as once
from locft_easyedit.locate.candidates import RUN_EPOCHS, Costs, diverse
from locft_easyedit.locate.experts import promising_experts
from locft_easyedit.locate.sensitivity import Sensitivity, sensitivities
from locft_easyedit.modeling import device_map as offload
from locft_easyedit.modeling.locations import Location
from locft_easyedit.modeling.parameter_slices import split_name, whole_name
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.training.choice import FILE_NAME, Choice

tiny_models = script_module(REPOSITORY / "benchmarks" / "checks" / "tiny_models.py")
ALL_AUTO = {"layers": "auto", "rewrite_module_tmp": "auto", "lr": "auto"}
N = 9


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A short text and few trials; the real ones take seconds on a toy."""
    monkeypatch.setattr(auto, "_PLACES", (3, 2))
    monkeypatch.setattr(auto, "_PLACES_FIRST", (3, 2))
    monkeypatch.setattr(auto, "_RATES", (auto._RATES[0], 2))
    short = trial.health_texts

    def one_passage(model, tokenizer):
        texts, why_not = short(model, tokenizer)
        return TokenizedTexts.from_lists([texts.ids[:40].tolist()], [1]), why_not

    monkeypatch.setattr(trial, "health_texts", one_passage)


def auto_hparams(**changes):
    return toy_hparams(**(ALL_AUTO | {"num_steps": 25} | changes))


def chosen(requests=None, *, model=None, **changes):
    """Returns the session that has chosen."""
    session = open_session(
        model or toy_model("llama"),
        toy_tokenizer(pad_is_eos=True),
        requests or toy_requests(N),
        auto_hparams(**changes),
        progress=False,
    )
    session.check()
    return session


def without_time(choice):
    return {key: value for key, value in choice.to_dict().items() if key != "seconds"}


class Untouchable(Mapping):
    """A record that gives what is trained of it, and fails at anything else."""

    def __init__(self, request):
        # The subject is looked at for prompts that leave its place open, "{}".
        nothing = {"rewordings": None, "subject": None}
        self._own = {key: request[key] for key in ("prompt", "target_new")} | nothing

    def __getitem__(self, key):
        if key not in self._own:
            raise AssertionError(f"{key} was looked at")
        return self._own[key]

    def get(self, key, default=None):
        return self[key]

    def __contains__(self, key):
        return self[key] is not None

    def __iter__(self):
        raise AssertionError("all keys were looked at")

    __len__ = __iter__


def test_the_choice_sees_prompts_and_targets_alone():
    plain = toy_requests(N)
    others = [
        request | {"rephrase_prompt": "Nothing", "locality": {}, "portability": {}, "subject": "x"}
        for request in plain
    ]
    expected = without_time(chosen(plain).choice)
    assert without_time(chosen(others).choice) == expected
    assert without_time(chosen([Untouchable(request) for request in plain]).choice) == expected
    other = [request | {"target_new": "Ibsen"} for request in plain]
    assert without_time(chosen(other).choice) != expected  # what it does look at counts


def test_choosing_leaves_the_model_as_it_was(no_limit):
    model = toy_model("llama")
    model.train()
    some = list(model.parameters())[::2]
    for parameter in some:
        parameter.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    torch.manual_seed(7)
    random = torch.get_rng_state()
    with torch.no_grad():
        session = chosen(model=model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    assert torch.equal(torch.get_rng_state(), random)
    assert len(session.choice.tried) >= 3 + 2  # places, rates, and rates that were raised


def test_the_model_is_restored_when_choosing_is_interrupted(monkeypatch):
    model = toy_model("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupted(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial.Trials, "_likely", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen(model=model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_the_session_trains_what_was_chosen():
    model = toy_model("llama")
    with chosen(model=model, num_steps=5) as session:
        result = session.train_()
    h, cell = session.hparams, session.choice.cell
    assert (h.layers, h.lr) == ([cell.location.layer], cell.lr)
    assert h.rewrite_module_tmp == cell.location.rewrite_module_tmp
    assert result.summary()["choice"]["cell"]["lr"] == cell.lr
    reference = toy_model("llama")
    edit_model(reference, toy_tokenizer(pad_is_eos=True), toy_requests(N), h, progress=False)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("changes", "size"), [({}, 9), ({"batch_size": 4}, 4),
                                               ({"min_batches": 3}, 3)])  # fmt: skip
def test_rates_are_tried_with_the_steps_of_the_run(changes, size, monkeypatch):
    sizes = []

    def run(self, *args):
        sizes.append(self.batch_size)
        return trial.TrialScores(1, 1, 0.1, 0.5)

    monkeypatch.setattr(trial.Trials, "run", run)
    chosen(**({"batch_size": 9} | changes))
    assert set(sizes) == {size}


@pytest.fixture
def no_limit(monkeypatch):
    """A budget for everything."""
    monkeypatch.setattr(Costs, "allowance", lambda self, layer, epochs: 1e12)


def test_the_best_of_the_last_round_is_chosen(monkeypatch, no_limit):
    scores = iter([0.2, 0.5, 0.3, 0.4, 0.6])
    monkeypatch.setattr(trial.Trials, "run", lambda *a: trial.TrialScores(1, 1, 0.1, next(scores)))
    choice = chosen().choice
    rate = choice.tried[1].cell.lr
    assert [one.cell.location for one in choice.tried[3:]] == [choice.tried[1].cell.location] * 2
    assert [one.cell.lr / rate for one in choice.tried[3:]] == pytest.approx([1, 0.5], rel=0.05)
    assert choice.cell == choice.tried[4].cell

    scores = iter([0.2, 0.5, 0.3])
    choice = chosen(lr=1e-3).choice
    assert len({one.cell.location for one in choice.tried}) == 3
    assert choice.cell == choice.tried[1].cell


def base_rates(monkeypatch):
    """Returns the rate of each place that is tried where nothing has to be raised."""
    monkeypatch.setattr(trial.Trials, "run", lambda *a: trial.TrialScores(1, 1, 0.1, 0.5))
    return {one.cell.location: one.cell.lr for one in chosen().choice.tried[:3]}


@pytest.mark.parametrize(
    ("found", "tried", "kept"),
    [
        ([(0.1, 0.1), (0.6, 0.4)], [1, 3], 3),  # learned with the second
        ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], [1, 3, 9], 9),  # never quite: the best
        ([(0.4, 0.3), (0.6, 0.2)], [1, 3], 1),  # learned, but at too high a price
        ([(0.1, 0.1), (float("nan"), 0.0)], [1, 3], 1),  # diverged
    ],
)
def test_rates_are_raised_where_too_little_is_learned(monkeypatch, no_limit, found, tried, kept):
    base = base_rates(monkeypatch)
    coming = iter(found)

    def run(self, cell, epochs):
        learned, score = next(coming, (0.9, 0.05))
        diverged = learned != learned
        return trial.TrialScores() if diverged else trial.TrialScores(learned, 1, 0.1, score)

    monkeypatch.setattr(trial.Trials, "run", run)
    every = chosen().choice.tried
    first = every[0].cell.location
    raised, others = every[: len(tried)], every[len(tried) : len(tried) + 2]
    assert [one.cell.location for one in raised] == [first] * len(tried)
    rates = [one.cell.lr / base[first] for one in raised]
    assert rates == pytest.approx(tried, rel=0.05)
    for one in others:  # all places take the scale that suited the first
        assert one.cell.location != first
        assert one.cell.lr / base[one.cell.location] == pytest.approx(kept, rel=0.05)


def test_a_rate_that_is_given_is_never_raised(monkeypatch):
    monkeypatch.setattr(trial.Trials, "run", lambda *a: trial.TrialScores(0.1, 1, 0.1, 0.1))
    assert {one.cell.lr for one in chosen(lr=1e-3).choice.tried} == {1e-3}


def test_less_drift_decides_between_equals(monkeypatch):
    drifts = iter([0.5, 0.1, 0.3])
    monkeypatch.setattr(trial.Trials, "run", lambda *a: trial.TrialScores(1, 1, next(drifts), 0.5))
    choice = chosen(lr=1e-3).choice
    assert choice.cell == choice.tried[1].cell


def test_no_more_is_spent_than_the_best_place_allows(monkeypatch):
    monkeypatch.setattr(trial.Trials, "run", lambda *a: trial.TrialScores(1, 1, 0.1, 0.5))
    monkeypatch.setattr(Costs, "sensitivities", lambda self: 1.0)
    monkeypatch.setattr(Costs, "trial", lambda self, layer, epochs: 1.0)
    monkeypatch.setattr(Costs, "allowance", lambda self, layer, epochs: 3.5)
    assert len(chosen(lr=1e-3).choice.tried) == 2
    monkeypatch.setattr(Costs, "allowance", lambda self, layer, epochs: 5.5)
    places = [one.cell.location for one in chosen().choice.tried]
    assert len(places) == 4  # two places, and two rates at one of them
    assert len(set(places)) == 2
    # The best place's own allowance counts, not only that of the one to be tried.
    best = places[0].layer
    monkeypatch.setattr(
        Costs, "allowance", lambda self, layer, epochs: 2.5 if layer == best else 100.0
    )
    assert len(chosen(lr=1e-3).choice.tried) == 1


def test_a_given_module_and_rate_are_kept(no_limit):
    template = "model.layers.{}.mlp.up_proj.weight"
    session = chosen(rewrite_module_tmp=template, lr=5e-3)
    assert session.hparams.rewrite_module_tmp == template
    assert {one.cell.lr for one in session.choice.tried} == {5e-3}
    assert len({one.cell.location.layer for one in session.choice.tried}) > 1
    assert session.choice.n_places == 4


def test_lora_chooses_among_matrices_of_linear_layers():
    session = chosen(tuning="lora", lora_rank=2, lr=1e-2)
    modules = {one.cell.location.module for one in session.choice.tried}
    assert modules
    assert "layer" not in modules  # it has norms
    with pytest.raises(
        PlaceError, match=r"no layer that can be trained(?s:.*)no matrix of a linear"
    ):
        chosen(tuning="lora", lr=1e-2, rewrite_module_tmp="model.layers.{}")


EXPERTS = "model.layers.{}.mlp.experts.down_proj"


@pytest.mark.parametrize("template", [EXPERTS, f"{EXPERTS}[2]"])
def test_given_experts_are_ranked_and_tried(template):
    session = chosen(model=toy_model("mixtral"), rewrite_module_tmp=template)
    assert session.choice.n_places == 4
    assert all(one.promise is not None for one in session.choice.tried)
    assert {one.cell.location.rewrite_module_tmp for one in session.choice.tried} == {template}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_of_each_layers_experts_the_most_promising_one_is_a_place(kind, monkeypatch):
    found = []
    true = auto.sensitivities
    monkeypatch.setattr(
        auto, "sensitivities", lambda *a, **k: found.append(true(*a, **k)) or found[0]
    )
    screen = auto._Screen(
        toy_model(kind), toy_tokenizer(pad_is_eos=True),
        distinct_edits(toy_requests(N)).edits, auto_hparams(),
    )  # fmt: skip
    [figures] = found
    experts = {p: value for p, value in screen.promises.items() if p.module.startswith("expert_")}
    assert [(p.layer, p.module) for p in experts] == [
        (layer, module) for layer in range(4) for module in ("expert_gate_up", "expert_down")
    ]
    for place, promise in experts.items():
        whole = whole_name(place.templates[0]).format(place.layer)
        rivals = [figures[f"{whole}[{i}]"].promise for i in range(4)]
        assert promise == max(rivals)
        assert place.templates[0].endswith(f"[{rivals.index(max(rivals))}]")
    shared = {p: value for p, value in screen.promises.items() if p.module.startswith("shared_")}
    assert len(shared) == (12 if kind == "qwen2_moe" else 0)
    assert None not in shared.values()


def test_an_expert_that_no_edit_reaches_is_no_place():
    location = Location(1, "down", (EXPERTS,))
    name = EXPERTS.format(1)
    promising = Sensitivity(2.0, 4.0, (2.0,))
    figures = {name: promising, f"{name}[0]": Sensitivity(), f"{name}[1]": promising}
    assert promising_experts(figures, [location]) == {
        Location(1, "expert_down", (f"{EXPERTS}[1]",)): promising.promise
    }
    assert promising_experts({f"{name}[0]": Sensitivity()}, [location]) == {}
    assert promising_experts({}, [location]) == {}


def test_the_session_trains_the_expert_that_was_chosen(monkeypatch, no_limit):
    def run(self, cell, epochs):
        score = 1.0 if cell.location.module == "expert_down" else 0.5
        return trial.TrialScores(0.9, 0.9, 0.1, score)

    monkeypatch.setattr(trial.Trials, "run", run)
    monkeypatch.setattr(auto, "_PLACES", (12, 2))
    model = toy_model("mixtral")
    with chosen(model=model, lr=1e-2, num_steps=2) as session:
        [name] = session.train_().new
    assert session.choice.cell.location.module == "expert_down"
    assert name == session.hparams.rewrite_module_tmp.format(*session.hparams.layers)
    assert name[-3:] in ("[0]", "[1]", "[2]", "[3]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [2], "lr": 1e-3}, "`rewrite_module_tmp=auto` goes only with `layers=auto`"),
        ({"layers": [2], "rewrite_module_tmp": "l.{}"}, "`lr=auto` goes only with `layers=auto`"),
        ({"quantize_frozen": "8bit"}, "`quantize_frozen='8bit'` does not go with `layers=auto`"),
        ({"stream_frozen": True}, "`stream_frozen=True` does not go with `layers=auto`.*locate"),
        ({"tuning": "lora"}, "`lr=auto` does not go with `tuning=lora`"),
        ({"layers": "automatic"}, "a list of whole numbers, for example .22., or auto"),
        ({"layers": ["auto"]}, "a list of whole numbers"),
        ({"lr": "Auto"}, "`lr='Auto'`.*a number, or auto"),
        ({"num_steps": "auto"}, "num_steps.*a whole number"),
        ({"rewrite_module_tmp": ["auto"]}, "must hold {} once"),
    ],
)
def test_what_does_not_go_together_is_told(changes, message):
    with pytest.raises(HyperParamsError, match=message):
        auto_hparams(**changes)


def test_a_yaml_may_say_auto(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "alg_name: LocFT-BF\nmodel_name: m\nlayers: auto\nrewrite_module_tmp: auto\nlr: auto\n"
    )
    h = LocFTBFHyperParams.from_hparams(path)
    assert (h.layers, h.rewrite_module_tmp, h.lr) == ("auto", "auto", "auto")
    assert h.chooses
    assert not toy_hparams().chooses


def test_too_few_edits_are_told():
    with pytest.raises(RequestError, match="needs 8 distinct ones; there are 7"):
        chosen(toy_requests(7))
    same = [toy_requests(1)[0]] * 20
    with pytest.raises(RequestError, match="there are 1"):
        chosen(same)


def test_a_rate_that_diverges_everywhere_is_told(monkeypatch, no_limit):
    def diverged(*args, **kwargs):
        raise NonFiniteLossError("no number")

    monkeypatch.setattr(trial.EditSession, "train_", diverged)
    with pytest.raises(NonFiniteLossError, match=r"diverged at all of 3 places.*Lower `lr=9.0`"):
        chosen(lr=9.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("CUBLAS_STATUS_ALLOC_FAILED", NonFiniteLossError), ("shapes differ", RuntimeError)],
)
def test_memory_that_runs_out_ends_a_trial_and_another_error_all(
    said, expected, monkeypatch, no_limit
):
    def failed(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr(trial.EditSession, "train_", failed)
    with pytest.raises(expected, match="diverged at all" if said.isupper() else said):
        chosen(lr=9.0)


def test_a_model_that_does_not_fit_needs_a_layer(monkeypatch):
    monkeypatch.setattr(offload, "_fits", lambda *a: False)
    with pytest.raises(ModelError, match=r"`layers=auto` runs the whole model.*Name the layer"):
        offload.streaming_map(toy_model("llama"), auto_hparams(), torch.device("cpu"))


def test_a_resumed_run_does_not_choose_again(tmp_path, monkeypatch):
    first = chosen(checkpoint_dir=str(tmp_path))
    with monkeypatch.context() as m:
        m.setattr(once, "choose_place", None)
        again = chosen(checkpoint_dir=str(tmp_path))
    assert again.choice.to_dict() == first.choice.to_dict()
    assert again.hparams == first.hparams
    with pytest.raises(CheckpointError, match=r"chosen for another run.*(?s:.*)edits"):
        chosen(toy_requests(N + 1), checkpoint_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"chosen for another run.*(?s:.*)batch_size"):
        chosen(checkpoint_dir=str(tmp_path), batch_size=3)
    model = toy_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match=r"chosen for another run.*(?s:.*)model"):
        chosen(model=model, checkpoint_dir=str(tmp_path))
    for damaged in ("{", "[]", '{"format": 1}', '{"format": 2, "identity": {}}'):
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged or of another version.*Remove it"):
            chosen(checkpoint_dir=str(tmp_path))


def test_a_choice_comes_back_from_json():
    choice = chosen().choice
    there = json.loads(json.dumps(choice.to_dict()))
    assert Choice.from_dict(there).to_dict() == choice.to_dict()


def test_what_is_written_has_the_chosen_place(tmp_path):
    model, tokenizer = toy_model("llama"), toy_tokenizer(pad_is_eos=True)
    h = auto_hparams(num_steps=4)
    done = edit_and_measure(
        model, tokenizer, toy_requests(N), h, metrics=["accuracy"], progress=False
    )
    write_run(tmp_path, done, h, model=model)
    kept = json.loads((tmp_path / "hparams.json").read_text())
    cell = done.result.choice.cell
    assert kept["layers"] == [cell.location.layer]
    assert kept["rewrite_module_tmp"] == cell.location.rewrite_module_tmp
    assert kept["lr"] == cell.lr
    record = json.loads((tmp_path / "metrics.json").read_text())["training"]["choice"]
    assert record == json.loads(json.dumps(done.result.choice.to_dict()))
    assert Delta.load(tmp_path / "edit.safetensors").metadata["hparams"]["layers"] == kept["layers"]


def test_the_command_takes_auto(toy_folder):
    (toy_folder / "edits.json").write_text(json.dumps(toy_requests(N)))
    done = run(
        "--config-name", "toy.yaml", "data=edits.json", "layers=auto", "rewrite_module_tmp=auto",
        "lr=auto", "num_steps=1", "output=out", "health_check=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = json.loads((toy_folder / "out" / "hparams.json").read_text())
    assert isinstance(kept["layers"][0], int)
    assert isinstance(kept["lr"], float)


def test_too_few_edits_show_before_a_model_is_loaded(toy_folder, monkeypatch):
    monkeypatch.setattr(edit, "load_model", None)
    command = {
        "data": "edits.json", "n": 6, "save": "none", "resume": True, "metrics": ["accuracy"],
    }  # fmt: skip
    with pytest.raises(RequestError, match="needs 8 distinct ones; there are 6"):
        edit.run_edit(auto_hparams(model_name="./toy"), command, toy_folder / "out")
    assert not (toy_folder / "out").exists()


def test_a_plan_needs_a_place():
    from locft_easyedit.plan.plan import make_plan

    with pytest.raises(HyperParamsError, match="`layers=auto` chooses the place with the loaded"):
        make_plan(auto_hparams(), None, None)


def test_an_editor_keeps_its_first_choice(easyedit, monkeypatch, caplog):
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams(**ALL_AUTO, num_steps=3))
    requests = toy_requests(2 * N)
    with caplog.at_level(logging.INFO, logger="locft_easyedit"):
        editor.edit_requests(requests[:N], sequential_edit=True, verbose=False)
    place = list(editor.last_result.new)
    assert editor.last_result.choice is not None
    assert "Later calls of this editor keep layer" in caplog.text
    monkeypatch.setattr(once, "choose_place", None)
    editor.edit_requests(requests[N : N + 2], sequential_edit=True, verbose=False)
    assert list(editor.last_result.new) == place
    assert editor.hparams.layers != "auto"


def test_edits_made_alone_choose_once(easyedit, monkeypatch):
    calls = []
    true = auto.choose_place
    monkeypatch.setattr(once, "choose_place", lambda *a, **k: calls.append(1) or true(*a, **k))
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams(**ALL_AUTO, num_steps=2))
    editor.edit_requests(toy_requests(8), verbose=False)
    assert len(calls) == 1


# What the pass says of a matrix, against gradients that are made the plain way.


def gradients(model, parameter, texts, labels_of=None):
    """Returns each text's gradient of the sum, and of the mean, of its tokens' losses."""
    found = []
    for i in range(len(texts)):
        ids = torch.from_numpy(texts.ids[texts.offsets[i] : texts.offsets[i + 1]])[None]
        logits = model(input_ids=ids[:, :-1]).logits[0, int(texts.target_start[i]) - 1 :]
        labels = ids[0, int(texts.target_start[i]) :] if labels_of is None else labels_of[i]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        found.append(
            (
                torch.autograd.grad(losses.sum(), parameter, retain_graph=True)[0],
                torch.autograd.grad(losses.mean(), parameter)[0],
            )
        )
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_sensitivities_are_those_of_plain_gradients(kind, packed, monkeypatch):
    from locft_easyedit.locate import sensitivity

    model, tokenizer = toy_model(kind), toy_tokenizer(pad_is_eos=True)
    edits = distinct_edits(toy_requests(7)).edits
    parts = [tokenize_edits(tokenizer, group) for group in (edits[:3], edits[3:5], edits[5:])]
    # The data's own tokens in place of drawn ones: the plain way has to know them.
    ids = np.concatenate(
        [
            p.ids[p.offsets[i] + p.target_start[i] : p.offsets[i + 1]]
            for p in parts[2:]
            for i in range(len(p))
        ]
    )
    monkeypatch.setattr(sensitivity, "_drawn", lambda logits: torch.from_numpy(ids))
    figures = sensitivities(model, find_layers(model), *parts, packed=packed)
    n_text = int((parts[2].lengths - parts[2].target_start).sum())
    watched = {n: model.get_parameter(whole_name(n)) for n in figures if ".1." in n}
    assert len(watched) >= 4
    assert any("[" in name for name in watched) == (kind == "qwen2_moe")
    for name, parameter in watched.items():
        expert = split_name(name)[1]
        where = ... if expert is None else int(expert)
        of_edits, of_rewordings, of_text = (
            [(total[where], mean[where]) for total, mean in gradients(model, parameter, p)]
            for p in parts
        )
        step = torch.stack([mean for _, mean in of_edits]).mean(0).sign()
        gain = float((step * torch.stack([mean for _, mean in of_rewordings]).mean(0)).sum())
        trace = sum(float(total.square().sum()) for total, _ in of_text) / n_text
        assert figures[name].gain == pytest.approx(gain, rel=2e-3, abs=1e-3)
        assert figures[name].trace == pytest.approx(trace, rel=1e-4)
        moves = [float((step * total).sum()) / n_text**0.5 for total, _ in of_text]
        assert figures[name].moves == pytest.approx(moves, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("phimoe", True),  # its router is a linear layer that returns three tensors
        ("gpt_oss", True),  # stores [experts, in, out], with biases
        ("llama4_text", False),  # gives every expert all tokens, scaled: no row is one of a token
    ],
)
def test_experts_that_are_given_other_things_are_left_alone(model_type, told):
    model, tokenizer = tiny_models.tiny_model(model_type).eval(), toy_tokenizer(pad_is_eos=True)
    edits = distinct_edits(toy_requests(7)).edits
    parts = [tokenize_edits(tokenizer, group) for group in (edits[:3], edits[3:5], edits[5:])]
    figures = sensitivities(model, find_layers(model), *parts, packed=False)
    assert any("o_proj" in name for name in figures)
    assert any("down_proj[3]" in name for name in figures) == told


def test_promise_is_a_gain_for_a_drift():
    one = Sensitivity(2.0, 4.0, (0.0, 2.0))
    assert one.promise == 1.0
    # A passage that two matrices move to either side does not feel it.
    both = one + Sensitivity(1.0, 0.0, (2.0, -2.0))
    assert (both.gain, both.trace, both.moves) == (3.0, 4.0, (2.0, 0.0))
    assert Sensitivity().promise == -float("inf")
    assert Sensitivity(float("nan"), 1.0, (1.0,)).promise == -float("inf")


def test_the_work_is_within_a_tenth_of_a_run(monkeypatch):
    """Counts the tokens that go through each layer, and compares the choice with its allowance."""
    model = toy_model("llama")
    n_tokens = [0]

    def count(module, args, output):
        n_tokens[0] += args[0].shape[0] * args[0].shape[1] * (3 if output.requires_grad else 1)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count)
    session = chosen(model=model)
    tokens = tokenize_edits(toy_tokenizer(pad_is_eos=True), session.edits.edits, append_eos=False)
    costs = Costs(4, 0.0, float(tokens.lengths.mean()), 0.0, N, 10, 0, 0)
    layer = session.choice.cell.location.layer
    assert 0 < n_tokens[0] < costs.allowance(layer, RUN_EPOCHS)


def test_without_room_for_trials_the_most_promising_place_is_taken(monkeypatch):
    monkeypatch.setattr(Costs, "allowance", lambda self, layer, epochs: 0.0)
    choice = chosen().choice
    assert choice.tried == ()


def test_places_that_are_tried_differ():
    promises = {
        Location(layer, module, ("x.{}",)): layer + (100.0 if module == "down" else 0.0)
        for layer in range(30)
        for module in ("down", "up", "o")
    }
    found = diverse(promises, 6, 30)
    assert [(place.layer, place.module) for place in found] == [
        (29, "down"), (26, "down"), (29, "o"), (29, "up"), (26, "o"), (26, "up"),
    ]  # fmt: skip
    unknown = diverse(dict.fromkeys(promises), 4, 30)
    assert len({place.layer for place in unknown}) == 4
    only = {place: value for place, value in promises.items() if place.module == "up"}
    assert [place.layer for place in diverse(only, 3, 30)] == [29, 26, 23]
