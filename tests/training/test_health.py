"""The health check: a naive perplexity, damage that is seen, and nothing that it leaves behind."""

import json
import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    FEW_KINDS,
    loaded_hparams,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.api import edit_model
from locft_easyedit.evaluation.report import health_table
from locft_easyedit.modeling.devices import context_length
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.prefix.frozen_prefix import FrozenPrefix
from locft_easyedit.prefix.runner import TextRunner
from locft_easyedit.training import health, weight_norms
from locft_easyedit.training.health import health_texts
from locft_easyedit.training.health_report import (
    PERPLEXITY_RATIO,
    RELATIVE_CHANGE,
    HealthReport,
    damages,
)
from locft_easyedit.training.session import EditSession
from locft_easyedit.training.weight_norms import change_of, spectral_norm
from locft_easyedit.utils.output import write_json

NAME = "model.layers.2.mlp.down_proj.weight"


@torch.no_grad()
def naive_perplexity(model, tokenizer):
    """The perplexity of the text, passage by passage, by full forward passes."""
    passages = health._TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    nll, count = 0.0, 0
    for passage in passages:
        ids = torch.tensor(tokenizer(passage)["input_ids"][: context_length(model)])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(nll / count)


def edited(model, tokenizer=None, n=6, **changes):
    h = toy_hparams(**changes)
    return edit_model(model, tokenizer or toy_tokenizer(), toy_requests(n), h, progress=False)


@pytest.fixture
def warned(caplog):
    """Returns the warnings about the model's health so far."""
    caplog.set_level(logging.WARNING, "locft_easyedit.training.health")
    return lambda: [r.message for r in caplog.records if r.name == "locft_easyedit.training.health"]


# What is measured


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_the_perplexity_is_the_naive_one(kind):
    model, tokenizer = toy_model(kind), toy_tokenizer(bos=kind == "gpt2")
    before = naive_perplexity(model, tokenizer)
    report = edited(model, tokenizer, rewrite_module_tmp=DOWN_PROJECTION[kind]).health
    # Rounding of float32 logits, summed over some hundred tokens.
    assert report.perplexity_before == pytest.approx(before, rel=1e-4)
    assert report.perplexity_after == pytest.approx(naive_perplexity(model, tokenizer), rel=1e-4)
    assert report.perplexity_after != report.perplexity_before
    assert report.not_measured == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [3]},
        {"layers": [3], "rewrite_module_tmp": "model.layers.{}."},
        {"prefix_cut": "layer"},
        {"frozen_prefix": False},
        {"packing": False},
        {"layers": [0]},
    ],
    ids=str,
)
def test_the_same_for_every_place_and_setting(changes):
    model, tokenizer = toy_model(), toy_tokenizer()
    before = naive_perplexity(model, tokenizer)
    report = edited(model, **changes).health
    assert report.perplexity_before == pytest.approx(before, rel=1e-4)
    assert report.perplexity_after == pytest.approx(naive_perplexity(model, tokenizer), rel=1e-4)


def test_the_text_is_small_and_varied():
    model, tokenizer = toy_model(max_position_embeddings=4096), toy_tokenizer()
    texts, why_not = health_texts(model, tokenizer)
    assert not why_not
    passages = health._TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(texts) == len(passages) >= 6
    assert texts.ids.tolist() == [i for ids in tokenizer(passages)["input_ids"] for i in ids]


def test_a_short_context_gets_the_beginnings():
    texts, why_not = health_texts(toy_model(max_position_embeddings=16), toy_tokenizer())
    assert not why_not
    assert set(texts.lengths.tolist()) == {16}
    model, tokenizer = toy_model(max_position_embeddings=64), toy_tokenizer()
    report = edited(model, tokenizer).health
    assert report.perplexity_after == pytest.approx(naive_perplexity(model, tokenizer), rel=1e-4)


def test_norms_of_a_change():
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(40, 30, generator=generator)
    new = old + 0.1 * torch.randn(40, 30, generator=generator)
    norms = change_of(old, new)
    assert norms["norm_ratio"] == pytest.approx(float(new.norm() / old.norm()), rel=1e-5)
    assert norms["relative_change"] == pytest.approx(
        float((new - old).norm() / old.norm()), rel=1e-5
    )
    largest = [float(torch.linalg.matrix_norm(m, 2)) for m in (new, old)]
    # The power method stops early.
    assert norms["spectral_ratio"] == pytest.approx(largest[0] / largest[1], rel=0.05)


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_pieces_give_the_same_norms(at_once, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(7, 5, 6, generator=generator) for _ in range(2))
    whole = change_of(old, new)
    monkeypatch.setattr(weight_norms, "_AT_ONCE", at_once)
    assert change_of(old, new) == pytest.approx(whole, rel=1e-5)
    largest = max(float(torch.linalg.matrix_norm(m, 2)) for m in new)
    assert spectral_norm(new) == pytest.approx(largest, rel=0.07)


@pytest.mark.parametrize(
    ("old", "new", "norms"),
    [
        (torch.zeros(3), torch.zeros(3), {"norm_ratio": 1.0, "relative_change": 1.0}),
        (torch.zeros(3), torch.ones(3), {"norm_ratio": math.inf, "relative_change": math.inf}),
        (torch.tensor(2.0), torch.tensor(3.0), {"norm_ratio": 1.5, "relative_change": 0.5}),
        (torch.zeros(2, 2), torch.eye(2), {"norm_ratio": math.inf, "relative_change": math.inf}),
    ],
    ids=["nothing", "from zero", "a number", "a matrix from zero"],
)
def test_norms_of_what_is_no_matrix_or_zero(old, new, norms):
    assert change_of(old, new) == norms
    assert damages(None, None, {"x": norms}, 100) == []


def test_half_precisions_are_measured_in_float32():
    old = torch.full((300, 300), 200.0, dtype=torch.float16)  # its square is no float16
    assert change_of(old, old * 2)["norm_ratio"] == pytest.approx(2.0)
    assert spectral_norm(old) == pytest.approx(60000.0, rel=1e-4)


# What it says


def norms(change):
    return {"m": {"norm_ratio": 1.0, "relative_change": change, "spectral_ratio": 1.0}}


@pytest.mark.parametrize(
    ("before", "after", "change", "found"),
    [
        (10.0, 10.0 * PERPLEXITY_RATIO, RELATIVE_CHANGE, []),
        (10.0, 10.1 * PERPLEXITY_RATIO, 0.1, ["perplexity of ordinary text rose from 10"]),
        (10.0, 5.0, 0.1, []),
        (10.0, math.nan, 0.1, ["ordinary text is nan (10 before)"]),
        (10.0, math.inf, 0.1, ["ordinary text is inf (10 before)"]),
        (math.nan, math.nan, 0.1, []),
        (60.0, 1e5, 0.1, []),  # it guessed among 100 tokens before
        (60.0, math.nan, 0.1, ["ordinary text is nan"]),
        (None, None, 1.01 * RELATIVE_CHANGE, ["m changed by"]),
        (None, None, math.nan, ["m changed by nan"]),
        (10.0, 1e3, 1e3, ["rose from 10", "m changed by 1e+03 times its own norm"]),
    ],
)
def test_what_counts_as_damage(before, after, change, found):
    said = damages(before, after, norms(change), 100)
    assert len(said) == len(found)
    assert all(part in line for part, line in zip(found, said, strict=True))


def test_a_damaged_model_is_told_with_a_remedy(warned):
    model = toy_model()
    result = edited(model, lr=3.0)
    report = result.health
    assert report.damaged
    assert report.matrices[NAME]["relative_change"] > RELATIVE_CHANGE
    assert report.warnings[0].startswith(NAME)
    [message] = warned()
    assert report.warnings[0] in message
    assert "Lower `lr` (now 3)" in message
    assert "`locft delta revert`, or `result.restore_(model)`" in message


def test_a_healthy_model_is_not_warned_of(warned):
    report = edited(toy_model(), lr=1e-3).health
    assert not report.damaged
    assert report.warnings == []
    assert warned() == []


def test_what_is_no_number_is_damage(warned, monkeypatch):
    losses, calls = TextRunner.edit_losses, []

    def after(self, batch):
        calls.append(batch)
        found = losses(self, batch)
        return found if len(calls) == 1 else found * math.nan

    with session_of(toy_model()) as session:
        monkeypatch.setattr(TextRunner, "edit_losses", after)
        session._health.before()
        values = session.place.parameters
        report = session._health.after(values, values, lr=0.01)
    assert math.isfinite(report.perplexity_before)
    assert math.isnan(report.perplexity_after)
    assert report.damaged
    assert "ordinary text is nan" in warned()[0]


# Off, or not possible


def test_off_is_not_run(monkeypatch):
    def nothing(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(health, "health_texts", nothing)
    monkeypatch.setattr(health, "change_of", nothing)
    result = edited(toy_model(), health_check=False)
    assert result.health is None
    assert result.summary()["health"] is None


class Unable:
    """A tokenizer that fails, or gives what it is told to, for the health check's text alone."""

    unk_token_id = 0

    def __init__(self, ids=None):
        self.ids = ids

    def __call__(self, texts, **options):
        if self.ids is None:
            raise RuntimeError("no text of this kind")
        return {"input_ids": [self.ids] * len(texts)}


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (Unable(), r"the tokenizer cannot read the text \(RuntimeError\)"),
        (Unable([]), "makes next to no tokens"),
        (Unable([5]), "makes next to no tokens"),
        (Unable([5] * 20 + [10**6]), "has tokens that the model has no embedding for"),
        (Unable([0] * 20 + [5] * 5), "does not know most of the text"),
    ],
    ids=["fails", "nothing", "one token", "too large", "unknown"],
)
def test_a_tokenizer_that_cannot(tokenizer, reason):
    texts, why_not = health_texts(toy_model(), tokenizer)
    assert len(texts) == 0
    assert re.search(reason, why_not)


def test_a_text_that_cannot_be_read_leaves_the_norms(monkeypatch, warned):
    monkeypatch.setattr(health, "ids_of", lambda tokenizer, texts: [[5]] * len(texts))
    report = edited(toy_model(), lr=1e-3).health
    assert report.perplexity_before is report.perplexity_after is None
    assert "next to no tokens" in report.not_measured
    assert report.matrices[NAME]["relative_change"] > 0
    assert warned() == []


@pytest.mark.parametrize("method", ["record", "replaying"])
def test_a_failure_does_not_cost_the_edit(method, monkeypatch):
    model, expected = toy_model(), edited(toy_model(), health_check=False)
    with session_of(model) as session:
        with monkeypatch.context() as patch:
            patch.setattr(
                FrozenPrefix,
                method,
                lambda *_, **__: (_ for _ in ()).throw(RuntimeError("full\nx")),
            )
            session._health.before()
        result = session.train_()
    assert result.health.not_measured == "RuntimeError: full"
    assert result.health.perplexity_after is None
    assert torch.equal(result.new[NAME], expected.new[NAME])


def test_norms_that_cannot_be_taken_do_not_cost_the_edit_either(monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(health, "change_of", full)
    report = edited(toy_model()).health
    assert report.matrices == {}
    assert report.perplexity_after is not None
    assert report.not_measured == "OutOfMemoryError: out of memory"


def test_ctrl_c_ends_it_as_everything_else(monkeypatch):
    model = toy_model()
    before = model.state_dict()[NAME].clone()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FrozenPrefix, "replaying", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edited(model)
    assert torch.equal(model.state_dict()[NAME], before)


# In a session


def session_of(model, n=6, **changes):
    h = toy_hparams(**changes)
    return EditSession(model, toy_tokenizer(), toy_requests(n), h, progress=False)


def test_the_upper_layers_alone_run_twice_and_the_lower_ones_once():
    model, runs = toy_model(), {0: 0, 3: 0}
    with session_of(model) as session:
        for layer in runs:
            model.model.layers[layer].register_forward_pre_hook(
                lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1)
            )
        session._health.before()
        assert runs == {0: 1, 3: 1}
        session._health.before()
        values = session.place.parameters
        for _ in range(3):
            session._health.after(values, values, lr=0.1)
    assert runs == {0: 1, 3: 4}


def test_what_was_recorded_is_given_back():
    with session_of(toy_model()) as session:
        session.train_()
        budget = session._health._runner.prefix.budget
        assert sum(budget.taken) > 0
    assert sum(budget.taken) == 0


def test_a_later_training_is_compared_with_the_first_beginning():
    model, tokenizer = toy_model(), toy_tokenizer()
    before = naive_perplexity(model, tokenizer)
    with session_of(model) as session:
        first, second = session.train_().health, session.train_().health
    assert first.perplexity_before == second.perplexity_before
    assert second.perplexity_before == pytest.approx(before, rel=1e-4)
    assert second.perplexity_after == pytest.approx(naive_perplexity(model, tokenizer), rel=1e-4)


def test_edits_made_one_at_a_time_are_compared_by_norms_alone(warned, monkeypatch):
    model = toy_model()
    with session_of(model, lr=3.0) as session:
        monkeypatch.setattr(session._health, "_perplexity", None)
        reports = []
        for i in range(3):
            result = session.train_([i], progress=False)
            reports.append(result.health)
            result.restore_(model)
    assert [report.damaged for report in reports] == [True] * 3
    assert {report.not_measured for report in reports} == {"only the norms were compared"}
    assert len(warned()) == 1  # not hundreds of times


def test_each_alone_through_easyedit(easyedit):
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams())
    prompts = [request["prompt"] for request in toy_requests(3)]
    editor.edit(prompts, ["Norway"] * 3, sequential_edit=False, verbose=False)
    assert editor.last_result.health.not_measured == "only the norms were compared"
    editor.edit(prompts, ["Norway"] * 3, sequential_edit=True, verbose=False)
    assert editor.last_result.health.perplexity_after > 0


def test_random_states_and_what_is_learned_stay():
    torch.manual_seed(5)
    with_check = edited(toy_model())
    state = torch.get_rng_state()
    torch.manual_seed(5)
    without = edited(toy_model(), health_check=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert with_check.step_losses == without.step_losses
    assert torch.equal(with_check.new[NAME], without.new[NAME])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_report(mode):
    expected, model = edited(toy_model()).health, toy_model()
    with mode():
        found = edited(model).health
    assert found == expected
    assert found.not_measured == ""


def test_the_model_is_left_alone():
    model = toy_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.named_modules())
    with session_of(model) as session:
        session._health.before()
        values = session.place.parameters
        session._health.after(values, values, lr=0.1)
        assert session.budget.taken == [0, session._runner.prefix.store._taken[1], 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_streamed_model_is_measured_as_a_resident_one(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="50KB")
    toy_tokenizer().save_pretrained(tmp_path)
    reports = []
    for stream in (False, True):
        h = toy_hparams(model_name=str(tmp_path), stream_frozen=stream, device="cpu")
        model, tokenizer = load_model(h)
        with EditSession(model, tokenizer, toy_requests(6), h, progress=False) as session:
            reports.append(session.train_().health)
            if stream:
                assert session.stream.n_passes == 1  # no layer was read for this alone
    assert reports[0] == reports[1]
    assert reports[0].perplexity_after is not None


def test_no_layer_is_read_for_the_text_alone(tmp_path):
    toy_model().save_pretrained(tmp_path / "toy", max_shard_size="50KB")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    h = toy_hparams(
        model_name=str(tmp_path / "toy"), stream_frozen=True, device="cpu",
        prefix_dir=str(tmp_path / "kept"),
    )  # fmt: skip

    def run():
        model, tokenizer = load_model(h)
        with EditSession(model, tokenizer, toy_requests(6), h, progress=False) as session:
            return session.train_(), session.stream.n_passes

    first, passes = run()
    assert passes == 1
    assert first.health.not_measured == ""
    again, passes = run()  # the text's states stay with those of the edits
    assert passes == 0
    assert again.health == first.health
    largest = max((tmp_path / "kept").iterdir(), key=lambda path: path.stat().st_size)
    largest.unlink()  # the text is longer than the edits
    without, passes = run()
    assert passes == 0
    assert without.health.not_measured == (
        "the frozen layers would have to be read from disk for it alone"
    )
    assert without.health.perplexity_before is without.health.perplexity_after is None
    assert torch.equal(without.new[NAME], first.new[NAME])


def test_a_real_model(smollm2, warned):
    h = loaded_hparams(model_name=str(smollm2), layers=[27], lr=4e-3, num_steps=4)
    model, tokenizer = load_model(h)
    result = edit_model(model, tokenizer, toy_requests(4), h, progress=False)
    report = result.health
    assert 5 < report.perplexity_before < 30  # English, and not a guess among 49,152
    assert not report.damaged
    assert warned() == []
    result.restore_(model)
    damaged = edit_model(
        model, tokenizer, toy_requests(4), replace(h, lr=0.2), progress=False
    ).health
    assert damaged.perplexity_before == report.perplexity_before
    assert damaged.perplexity_ratio > PERPLEXITY_RATIO
    assert damaged.damaged
    assert "rose from" in warned()[0]


# What there is to see


def table_text(report):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(health_table(report))
    return console.export_text()


def test_the_table_and_the_summary(tmp_path):
    matrices = {NAME: {"norm_ratio": 1.25, "relative_change": 0.75, "spectral_ratio": 1.5}}
    text = table_text(HealthReport(12.5, 25.0, matrices, True, ["x"]))
    assert "it looks damaged" in text
    for part in ("12.5", "25", "2", f"{NAME}: norm", "1.25", "1.5", "0.75"):
        assert part in text
    assert "looks damaged" not in table_text(HealthReport(12.5, 12.5, matrices))
    text = table_text(HealthReport(None, None, {}, not_measured="the tokenizer [bold]"))
    assert "No perplexity: the tokenizer [bold]." in text

    result = edited(toy_model())
    summary = result.summary()["health"]
    assert summary["perplexity_ratio"] == result.health.perplexity_ratio
    assert summary["matrices"][NAME]["norm_ratio"] > 0
    assert HealthReport(4.0, 6.0, {}).perplexity_ratio == 1.5
    result.health = HealthReport(1.0, math.nan, {}, True, ["broken"])
    write_json(tmp_path / "x.json", result.summary())
    written = json.loads((tmp_path / "x.json").read_text())["health"]
    assert written["perplexity_after"] is None
    assert written["warnings"] == ["broken"]
