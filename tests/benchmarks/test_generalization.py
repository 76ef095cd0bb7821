"""The benchmark of what makes edits generalize: its runs, its arithmetic, its table and picture."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toys import REPOSITORY, toy_model, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.data.readers import read_requests
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, Evaluation, PairedMetrics
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.hparams import LocFTBFHyperParams

# Distributions before an edit are kept in float16 (see `Divergence`): 2e-4 of a KL here.
ROUNDING = 2e-3


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    names = ("generalization", "generalization_bench", "generalization_report")
    names += ("generalization_picture", "generalization_peers")
    return {name.removeprefix("generalization").strip("_"): importlib.import_module(name)
            for name in names}  # fmt: skip


@pytest.fixture
def run(scripts, toy_folder, monkeypatch, capsys):
    """Runs the script on the toy's six edits, in this process; returns what it prints."""

    def with_arguments(*arguments, output="out"):
        common = ["--model", "toy", "--hparams", "toy.yaml", "--data", "edits.json"]
        given = ["generalization.py", *common, "--output", output, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        scripts[""].main()
        return capsys.readouterr().out

    return with_arguments


@pytest.fixture
def no_model(scripts, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(scripts[""], "load_model", refuse)


TWO = ("--n", 3, "--seeds", 1, "--variants", "published", "--set", "faster:lr=6e-2,num_steps=40")


def lines(folder="out"):
    with open(f"{folder}/runs.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def edited_by_hand(requests, **changes):
    """Metrics of the toy before and after an edit that this test makes itself."""
    model, tokenizer = toy_model("llama"), toy_tokenizer(pad_is_eos=True)
    prompts = [p for r in requests for p in r["locality"]["neighborhood"]["prompt"]]

    def following():
        ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in prompts]
        with torch.no_grad():
            return [model(input_ids=one).logits[0, -1].double().log_softmax(-1) for one in ids]

    evaluation = Evaluation(model, tokenizer, requests, metrics=PLAIN_METRICS)
    before, first = evaluation.measure(), following()
    hparams = LocFTBFHyperParams.from_hparams("toy.yaml")
    for key, value in changes.items():
        setattr(hparams, key, value)
    result = edit_model(model, tokenizer, requests, hparams, progress=False)
    found = summarize(PairedMetrics(requests, before, evaluation.measure()))["post"]
    pairs = list(zip(first, following(), strict=True))
    found["kl"] = np.mean([float((a.exp() * (a - b)).sum()) for a, b in pairs])
    return found, result


def test_each_variant_gives_what_an_edit_of_a_fresh_model_gives(run):
    run(*TWO)
    published, faster = lines()
    assert [published["variant"], faster["variant"]] == ["published", "faster"]
    requests = read_requests("edits.json")[3:]  # all of the second half
    for line, changes in ((published, {}), (faster, {"lr": 6e-2, "num_steps": 40})):
        found, result = edited_by_hand(requests, seed=1, **changes)
        figures = line["figures"]
        assert figures["reliability"] == found["generated"]["reliability"]
        assert figures["generalization"] == found["generated"]["generalization"]
        assert figures["locality"] == found["locality"]["neighborhood_acc"]
        assert figures["portability"] == found["portability"]["one_hop_acc"]
        assert figures["kl"] == pytest.approx(found["kl"], rel=ROUNDING)
        assert figures["ppl_ratio"] == pytest.approx(result.health.perplexity_ratio)
        assert figures["epochs"] == len(result.losses)
        assert line["converged"] == result.converged
    assert faster["figures"]["kl"] > 2 * published["figures"]["kl"] > 0
    assert faster["figures"]["reliability"] > 0.5  # the comparison is of more than zeros
    assert faster["before"]["reliability"] == 0.0
    assert faster["changes"] == {"lr": "6e-2", "num_steps": 40}
    assert (faster["edits"], faster["measured"], faster["half"]) == (3, 3, "report")
    assert faster["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_method_of_easyedit_is_measured_as_ours_are(run, scripts, monkeypatch):
    peers, edited = scripts["peers"], []
    monkeypatch.setattr(peers, "run_apart", peers.run)  # in this process, where its model is seen

    class Seen(peers.Bench):
        def after(self):
            edited.append(self.model)
            return super().after()

    monkeypatch.setattr(peers, "Bench", Seen)
    run("--n", 3, "--seeds", 1, "--variants", "published", "ROME")
    published, rome = lines()
    assert (rome["variant"], rome["edits"], rome["trained"]) == ("ROME", 3, 3)
    assert rome["before"] == published["before"]
    changed = [name for (name, now), then in zip(
        edited[0].named_parameters(), toy_model("llama").parameters(), strict=True
    ) if not torch.equal(now, then)]  # fmt: skip
    [layer] = rome["method"]["hparams"]["layers"]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight"]
    requests, tokenizer = read_requests("edits.json")[3:], toy_tokenizer(pad_is_eos=True)
    metrics = Evaluation(edited[0], tokenizer, requests, metrics=PLAIN_METRICS).measure()
    found = summarize([{"post": one} for one in metrics])["post"]
    assert rome["figures"]["portability"] == found["portability"]["one_hop_acc"]
    assert rome["figures"]["reliability"] == found["generated"]["reliability"]
    moved = []
    for prompt in (p for r in requests for p in r["locality"]["neighborhood"]["prompt"]):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            a, b = (model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
                    for model in (toy_model("llama"), edited[0]))  # fmt: skip
        moved.append(float((a.exp() * (a - b)).sum()))
    assert rome["figures"]["kl"] == pytest.approx(np.mean(moved), rel=ROUNDING)
    assert rome["figures"]["kl"] > 0.01


def test_what_is_there_is_not_made_again(run, scripts, monkeypatch):
    run(*TWO)
    path = Path("out/runs.jsonl")
    before = path.read_text()
    path.write_text(before + before[:200])  # killed while it wrote
    made = []
    bench = scripts[""].Bench

    class Counted(bench):
        def run(self, hparams):
            made.append((hparams.seed, float(hparams.lr)))
            return super().run(hparams)

    monkeypatch.setattr(scripts[""], "Bench", Counted)
    run(*TWO[:3], 1, 2, *TWO[4:])
    assert made == [(2, 1e-2), (2, 6e-2)]
    assert path.read_text().startswith(before)
    assert [(line["seed"], line["variant"]) for line in lines()] == [
        (1, "published"), (1, "faster"), (2, "published"), (2, "faster"),
    ]  # fmt: skip
    monkeypatch.setattr(scripts[""], "load_model", None)  # would fail
    run(*TWO)
    assert len(made) == 2


def test_the_folder_of_another_comparison_is_refused(run, no_model, toy_folder):
    (toy_folder / "out").mkdir()
    old = {"model": "toy", "hparams": {"lr": 1}, "half": "report", "data": "edits.json", "n": 3,
           "seed": 0, "variant": "faster", "changes": {"lr": 5}, "data_sha256": "x"}  # fmt: skip
    (toy_folder / "out" / "runs.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(SystemExit, match=r"has runs of something else\. Choose another") as error:
        run(*TWO)
    for what in ("`hparams={'lr': 1}` there",
                 "`changes of faster={'lr': 5}` there; now {'lr': '6e-2'",
                 "`data_sha256 of edits.json='x'` there"):  # fmt: skip
        assert what in str(error.value)
    assert "`model=" not in str(error.value)


def test_halves(scripts):
    sample = scripts[""].sample
    requests = list(range(11))
    for seed in range(20):
        chosen, measured = sample(requests, "d", 3, seed, "choose")
        assert chosen == measured == sorted(chosen)
        assert set(chosen) < set(range(5))
        chosen, measured = sample(requests, "d", 6, seed, "report")
        assert chosen == measured == [5, 6, 7, 8, 9, 10]
        chosen, measured = sample(requests, "d", 8, seed, "report")  # more than the half has
        assert len(chosen) == len(set(chosen)) == 8
        assert measured == [i for i in chosen if i >= 5]
        assert len(chosen) > len(measured)
    assert len({tuple(sample(requests, "d", 3, seed, "choose")[0]) for seed in range(20)}) > 5
    assert sample(requests, "d", 3, 7, "choose") == sample(requests, "d", 3, 7, "choose")


def test_a_file_with_fewer_edits_gives_all_of_them_once(run):
    told = run("--n", 50, 100, "--seeds", 0, "--variants", "published")
    [line] = lines()
    assert (line["n"], line["edits"], line["measured"]) == (6, 6, 3)
    assert "edits.json, 6 edits; measured on 3, report half" in told


def test_everything_wrong_is_told_before_the_model_is_loaded(run, no_model, toy_folder):
    asked = ["--half", "all", "--n", 0, "--variants", "published", "agment", "--set",
             "published:lr=1", "noform", "seeded:seed=3", "broken:lr=[", "neg:lr=-1"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"^generalization.py: Nothing was run:") as error:
        run(*asked, "--data", "no.json", "edits.json")
    text = str(error.value)
    for part in ("`--half all` must be one of report, choose", "`--n 0` must be 1 or more",
                 "`--variants agment` is none of published, forms", "Choose another name",
                 "`--set noform` must have the form NAME:key=value", "seed is the same for all",
                 "`[` is no YAML", "variant neg:", "`lr=-1", "`data=no.json` is not"):  # fmt: skip
        assert part in text
    assert not (toy_folder / "out").exists()


def test_values_of_a_set_variant_are_yaml(scripts):
    problems = []
    given = ["a:lr=1e-3,preserve=[sampled, x.txt],forms_per_epoch=2", "b:health_check=false"]
    variants = scripts[""].variants_of(["published"], given, problems)
    assert not problems
    assert variants == {
        "published": {},
        "a": {"lr": "1e-3", "preserve": ["sampled", "x.txt"], "forms_per_epoch": 2},
        "b": {"health_check": False},
    }


def test_nothing_to_draw(run):
    with pytest.raises(SystemExit, match=r"holds no runs\. Make some first"):
        run("--draw-only", output="empty")


def test_a_training_that_diverges_is_a_row_and_leaves_the_model_as_it_was(run):
    wild = ("--set", "wild:lr=1e38", "calm:lr=1e-2,weight_decay=0.0")
    told = run("--n", 3, "--seeds", 1, "--variants", *wild)
    run(*TWO, output="apart")
    diverged, calm = lines()
    assert diverged["figures"] == {}
    assert "lr" in diverged["diverged"]
    assert calm["figures"]["kl"] == lines("apart")[0]["figures"]["kl"]
    assert "wild (1 of 1 diverged)" in told


def made(variant, seed, n=100, data="a.json", diverged=None, **figures):
    """A run's line, written by hand."""
    return {
        "model": "toy", "data": data, "half": "report", "n": n, "seed": seed, "variant": variant,
        "measured": n, "diverged": diverged, "figures": figures, "not_finite": [],
        "converged": True,
    }  # fmt: skip


def figures(reliability, generalization, kl):
    return {"reliability": reliability, "generalization": generalization, "kl": kl}


RUNS = [
    made("published", 0, **figures(1.0, 0.50, 0.4)),
    made("published", 1, **figures(1.0, 0.60, 0.2)),
    made("published", 2, **figures(1.0, 0.10, 9.0)),
    made("forms", 0, **figures(0.99, 0.70, 0.2)),
    made("forms", 1, **figures(0.99, 0.90, 0.1)),
    made("forms", 2, diverged="NaN"),
    made("text", 1, **figures(0.9, 0.55, 0.05)),
    made("forms", 0, n=20, **figures(1.0, 1.0, 1.0)),  # nothing to compare it with
]


def test_a_verdict_compares_the_seeds_that_both_have(scripts):
    forms, text = scripts["report"].verdicts(RUNS)
    assert (forms["variant"], forms["seeds"], forms["n"]) == ("forms", [0, 1], 100)
    assert forms["points"]["mean"] == pytest.approx(25)  # 20 and 30
    assert forms["points"]["sd"] == pytest.approx(math.sqrt(50))
    assert forms["kl_ratio"] == pytest.approx(0.5)
    assert forms["reliability"] == pytest.approx(0.99)
    assert forms["reliable"]
    assert text["points"] == {"mean": pytest.approx(-5), "sd": None, "values": [pytest.approx(-5)]}
    assert text["kl_ratio"] == pytest.approx(0.25)
    assert not text["reliable"]
    assert scripts["report"].told(forms) == (
        "forms: +25.0 ± 7.1 points of generalization against published; 0.5 times its KL; "
        "reliability 99.0 % (at least 99 %)."
    )
    assert "-5.0 points" in scripts["report"].told(text)
    assert "reliability 90.0 % (below 99 %)" in scripts["report"].told(text)


def test_table_in_both_forms(scripts):
    report = scripts["report"]
    rows = report.summaries(RUNS)
    assert [(row["n"], row["variant"]) for row in rows] == [
        (20, "forms"), (100, "published"), (100, "forms"), (100, "text"),
    ]  # fmt: skip
    found = rows[1]["figures"]["generalization"]
    assert found["mean"] == pytest.approx(0.4)
    assert found["sd"] == pytest.approx(np.std([0.5, 0.6, 0.1], ddof=1))
    text = report.markdown(rows, report.verdicts(RUNS))
    assert "| variant | reliability % | generalization % | KL, nats |\n| :-- | --: |" in text
    assert "| published | 100.0 ± 0.0 | 40.0 ± 26.5 | 3.20 ± 5.02 |" in text
    assert "| forms (1 of 3 diverged) | 99.0 ± 0.0 | 80.0 ± 14.1 | 0.150 ± 0.071 |" in text
    assert "| text | 90.0 | 55.0 | 0.0500 |" in text  # one seed has no deviation
    broken = made("text", 0, reliability=0.5) | {"not_finite": ["kl"]}
    [row] = report.summaries([broken])
    assert report.cells(row, report.COLUMNS[:2]) == ["text (not finite: kl)", "50.0", "-"]
    shown = report.terminal(rows, report.verdicts(RUNS))
    assert "40.0 ± 26.5" in shown
    assert "+25.0 ± 7.1 points" in shown


def test_written_report(run, scripts, toy_folder):
    (toy_folder / "out").mkdir()
    (toy_folder / "out" / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RUNS))
    told = run("--draw-only")
    summary = json.loads((toy_folder / "out" / "summary.json").read_text())
    assert summary["rows"] == scripts["report"].summaries(RUNS)
    assert summary["verdicts"] == scripts["report"].verdicts(RUNS)
    assert "forms: +25.0" in told
    assert "a.json, 100 edits" in (toy_folder / "out" / "table.md").read_text()
    assert (toy_folder / "out" / "front.png").stat().st_size > 10_000
    (toy_folder / "out" / "runs.jsonl").write_text("{\n")
    with pytest.raises(SystemExit, match=r"runs\.jsonl is damaged"):
        run("--draw-only")


def test_picture_has_a_panel_a_case_and_a_legend(scripts):
    runs = [*RUNS, made("text", 0, data="b.json", **figures(1, 0.2, 0.0))]
    report, draw = scripts["report"], scripts["picture"]
    cases = report.by_case(report.summaries(runs))
    figure = draw.picture(cases, "toy")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title() for axes in shown]
    assert sorted(titles) == [
        "a.json (report), 100 edits", "a.json (report), 20 edits", "b.json (report), 100 edits",
    ]  # fmt: skip
    axes = shown[titles.index("a.json (report), 100 edits")]
    assert axes.get_xscale() == "log"
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in axes.containers}
    assert list(points) == ["published", "forms", "text"]
    assert np.array(list(points.values())) == pytest.approx(
        np.array([[3.2, 40], [0.15, 80], [0.05, 55]])
    )
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(points)
    [x_bar, y_bar] = [bars.get_segments()[0] for bars in axes.collections[:2]]
    assert x_bar[:, 0] == pytest.approx([0.32, 3.2 + np.std([0.4, 0.2, 9.0], ddof=1)])
    assert y_bar[:, 1] == pytest.approx([40 - 26.458, 40 + 26.458], abs=1e-3)
