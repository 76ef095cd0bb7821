"""Capability: the harness's own figures, nothing changed around it, and mistakes told early."""

import copy
import gc
import json
import logging
import random
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from helpers.toys import toy_model, toy_tokenizer
from rich.console import Console

from locft_easyedit.cli.capability import main
from locft_easyedit.cli.help import help_of
from locft_easyedit.errors import HyperParamsError, LocFTError, MissingDependencyError
from locft_easyedit.evaluation.capability import metrics
from locft_easyedit.evaluation.capability.metrics import OWN_TASKS, PAPER_TASKS, choose_metric

pytest.importorskip("lm_eval", reason='pip install "locft_easyedit[capability]"')

import huggingface_hub
import lm_eval.tasks
from huggingface_hub import constants

from locft_easyedit.evaluation.capability import prepared_tasks as prepare
from locft_easyedit.evaluation.capability.harness import (
    capability_table,
    measure_capability,
    measure_prepared,
)
from locft_easyedit.evaluation.capability.prepared_tasks import CapabilityError, prepare_tasks
from locft_easyedit.evaluation.capability.surroundings import padded_copy

FULL_INDEX = lm_eval.tasks.TaskManager

CHOICE_TASK = """
task: {name}
custom_dataset: !function data.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{more}
"""

DATA = """
from datasets import Dataset

def load(**_):
    rows = [
        {"question": f"The river {i} is", "choices": ["long", "in Peru"], "answer": i % 2}
        for i in range(6)
    ]
    return {"test": Dataset.from_list(rows)}
"""


@pytest.fixture(autouse=True)
def quick_index(monkeypatch):
    """The harness without its 14,000 tasks, which take seconds to list."""

    def manager(include_path=None, include_defaults=True):
        return FULL_INDEX(include_path=include_path, include_defaults=False)

    manager.load = True
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that refuses connections."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of tasks, with two toy models beside it, as the current one."""
    for seed in (0, 1):
        toy_model(seed=seed).save_pretrained(tmp_path / f"toy{seed}")
        toy_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / f"toy{seed}")
    write(tmp_path / "tasks", "rivers")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name, more="", text=CHOICE_TASK):
    folder.mkdir(exist_ok=True)
    (folder / "data.py").write_text(DATA)
    (folder / f"{name}.yaml").write_text(text.format(name=name, more=more))
    return folder


def toy(**config):
    return toy_model(**config), toy_tokenizer()


def prompts_of(ready, name):
    return [instance.args for instance in ready.rows[name]["tasks"][name].instances]


def measure(tasks=OWN_TASKS, pair=None, **options):
    return measure_capability(*(pair or toy()), list(tasks), progress=False, **options)


# The figures


def test_own_tasks_give_the_figures_of_the_harness_itself():
    result = measure(limit=12)
    model, tokenizer = toy()
    lm = lm_eval.models.huggingface.HFLM(model, tokenizer=tokenizer, batch_size=1)
    loaded = FULL_INDEX(include_path=prepare.OWN_TASKS_FOLDER, include_defaults=False).load(
        list(OWN_TASKS)
    )
    reference = lm_eval.evaluator.evaluate(lm, loaded, limit=12)["results"]
    basics, copying = (result["tasks"][name] for name in OWN_TASKS)
    assert basics == {
        "metric": "acc",
        "value": reference["locft_basics"]["acc,none"],
        "stderr": reference["locft_basics"]["acc_stderr,none"],
        "n": 12,
        "num_fewshot": 0,
        "all": {"acc": reference["locft_basics"]["acc,none"]},
    }
    assert 0 < basics["value"] < 1
    assert copying["metric"] == "exact_match,first_word"
    assert copying["value"] == reference["locft_copying"]["exact_match,first_word"]
    assert result["mean"] == (basics["value"] + copying["value"]) / 2
    assert json.loads(json.dumps(result)) == result


def test_batch_size_changes_nothing():
    results, rows = [], []
    for size in (1, 8):
        model, tokenizer = toy()
        run = set()
        model.register_forward_pre_hook(
            lambda _, args, kwargs, run=run: run.add(len((args or [kwargs["input_ids"]])[0])),
            with_kwargs=True,
        )
        results.append(measure(pair=(model, tokenizer), batch_size=size, limit=20))
        rows.append(max(run))
    assert results[0] == results[1]
    assert rows == [1, 8]


def test_a_second_measurement_of_the_same_tasks_is_the_same():
    ready = prepare_tasks(OWN_TASKS, limit=20)
    results = [measure_prepared(*toy(seed=s), ready, progress=False) for s in (0, 1, 0)]
    assert results[0] == results[2] == measure(limit=20)
    assert results[0] != results[1]


def test_from_any_folder_and_in_any_process_of_a_launch(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert measure(["locft_copying"], limit=2)["tasks"]["locft_copying"]["n"] == 2
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_real_model_beats_chance_and_damage_shows(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ready = prepare_tasks(OWN_TASKS, limit=16)
    whole = measure_prepared(model, tokenizer, ready, progress=False)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers[10:20]:
        for weight in layer.mlp.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = noise * weight.data.std()
    damaged = measure_prepared(model, tokenizer, ready, progress=False)
    for name in OWN_TASKS:
        before, after = (r["tasks"][name]["value"] for r in (whole, damaged))
        assert 0.45 < before < 1
        assert after < before - 0.2
    assert whole["tasks"]["locft_basics"]["value"] > 0.6


def test_the_questions_are_sound():
    folder = prepare.OWN_TASKS_FOLDER / "locft_basics"
    questions = json.loads((folder / "basics.json").read_text(encoding="utf-8"))
    patterns = json.loads((folder / "copying.json").read_text(encoding="utf-8"))
    assert (len(questions), len(patterns)) == (80, 20)
    assert len({(q["question"], q["choices"][q["answer"]]) for q in questions}) == 80
    assert all(len(set(q["choices"])) == 4 for q in questions)
    # A model that always takes the same place is right by chance.
    assert [sum(q["answer"] == i for q in questions) for i in range(4)] == [20] * 4
    # A limit takes the first ones: they are of every kind.
    assert len({q["kind"] for q in questions[:6]}) == len({q["kind"] for q in questions}) == 6
    assert all(p["answer"].isalnum() for p in patterns)
    assert len({p["pattern"] for p in patterns}) == 20


# Which metric counts


@pytest.mark.parametrize(
    ("task", "keys", "chosen"),
    [
        ("mmlu", ["acc,none", "acc_norm,none"], "acc,none"),
        ("nq_open", ["exact_match,remove_whitespace"], "exact_match,remove_whitespace"),
        ("wmt16-de-en", ["bleu,none", "ter,none", "chrf,none"], "bleu,none"),
        (
            "gsm8k",
            ["exact_match,strict-match", "exact_match,flexible-extract"],
            "exact_match,flexible-extract",
        ),
        ("hellaswag", ["acc,none", "acc_norm,none"], "acc_norm,none"),
        ("x", ["f1,none", "exact_match,get-answer"], "exact_match,get-answer"),
        ("x", ["acc,b", "acc,a"], "acc,b"),
        ("x", ["acc,b", "acc,none"], "acc,none"),
        ("x", ["chrf,none", "f1,none"], "f1,none"),
        ("x", ["word_perplexity,none"], None),
    ],
)
def test_the_metric_that_counts(task, keys, chosen):
    assert choose_metric(task, keys) == chosen


def test_bleu_is_a_share():
    assert metrics.scale_of("bleu,none") == 100
    assert metrics.scale_of("acc,none") == 1


def test_a_metric_in_per_cent_is_divided_and_has_no_resampled_error(tmp_path, capfd):
    text = CHOICE_TASK.replace("multiple_choice", "generate_until").replace("acc\n", "chrf\n")
    text = text.replace("aggregation: mean", "aggregation: chrf")
    text = text.replace("doc_to_target: answer", "doc_to_target: '{{{{choices[0]}}}}'")
    text = text.replace('doc_to_choice: "{{{{choices}}}}"', "")
    more = "generation_kwargs: {max_gen_toks: 4, until: ['x'], do_sample: false}"
    entry = measure(["said"], tasks_dir=write(tmp_path, "said", more, text))["tasks"]["said"]
    assert entry["metric"] == "chrf"
    assert entry["stderr"] is None
    assert 0 < entry["value"] == entry["all"]["chrf"] / 100 < 0.5
    assert capfd.readouterr().out == ""


# Groups, tags, examples


def test_a_group_with_an_aggregate_is_one_task(tmp_path):
    write(tmp_path, "rivers")
    write(tmp_path, "streams", "num_fewshot: 1")
    (tmp_path / "water.yaml").write_text(
        "group: water\ntask: [rivers, streams]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    result = measure(["water", "rivers"], tasks_dir=tmp_path, limit=4)
    assert list(result["tasks"]) == ["water", "rivers"]
    water, rivers = result["tasks"].values()
    assert (water["n"], rivers["n"]) == (8, 4)
    assert (water["num_fewshot"], rivers["num_fewshot"]) == (None, 0)
    assert water["metric"] == "acc"
    streams = measure(["streams"], tasks_dir=tmp_path, limit=4)["tasks"]["streams"]
    assert streams["num_fewshot"] == 1
    assert water["value"] == (rivers["value"] + streams["value"]) / 2


@pytest.mark.parametrize("more", ["tag: wet", ""], ids=["tag", "group"])
def test_a_tag_or_a_mere_list_stands_for_its_members(tmp_path, more):
    write(tmp_path, "rivers", more)
    write(tmp_path, "streams", more)
    if not more:
        (tmp_path / "wet.yaml").write_text("group: wet\ntask: [rivers, streams]\n")
    result = measure(["wet", "rivers"], tasks_dir=tmp_path, limit=2)
    assert list(result["tasks"]) == ["rivers", "streams"]


def test_examples_in_the_prompt(tmp_path):
    write(tmp_path, "rivers")
    write(tmp_path, "fixed", "num_fewshot: 0")
    result = measure(["rivers", "fixed"], tasks_dir=tmp_path, num_fewshot=2)
    assert [entry["num_fewshot"] for entry in result["tasks"].values()] == [2, 0]


def test_examples_are_those_that_the_harness_draws(tmp_path):
    folder = write(tmp_path, "rivers")
    ready = prepare_tasks(["rivers"], tasks_dir=folder, num_fewshot=2)
    model, tokenizer = toy()
    random.seed(7)  # no matter
    measure_prepared(model, tokenizer, ready, progress=False)
    ours = prompts_of(ready, "rivers")
    reference = lm_eval.evaluator.simple_evaluate(
        model=lm_eval.models.huggingface.HFLM(model, tokenizer=tokenizer),
        tasks=["rivers"],
        task_manager=FULL_INDEX(include_path=folder, include_defaults=False),
        num_fewshot=2,
        bootstrap_iters=0,
    )["samples"]["rivers"]
    theirs = [tuple(args) for sample in reference for args in sample["arguments"]]
    assert ours == theirs
    assert len(set(ours)) == 12


# NaN


@pytest.mark.parametrize("task", OWN_TASKS)
def test_nan_is_no_value_and_says_why(task):
    model, tokenizer = toy()
    model.lm_head.weight.data[5] = float("nan")
    result = measure([task, *OWN_TASKS], (model, tokenizer), limit=3)
    assert result["mean"] is None
    for name in OWN_TASKS:
        entry = result["tasks"][name]
        assert entry["value"] is entry["stderr"] is None
        assert entry["reason"] == "the model gave NaN"
        assert name in result["reason"]
    assert "no value" in shown(capability_table({"model": result}))


def test_a_value_that_is_no_share_is_told(tmp_path):
    text = CHOICE_TASK + "process_results: !function score.results\n"
    write(tmp_path, "rivers", text=text)
    (tmp_path / "score.py").write_text("def results(doc, results):\n    return {'acc': 40}\n")
    entry = measure(["rivers"], tasks_dir=tmp_path)["tasks"]["rivers"]
    assert entry["value"] is None
    assert entry["reason"] == "acc=40.0 is no share between 0 and 1"
    assert entry["all"] == {"acc": 40.0}


# Nothing is changed


def test_the_model_and_its_tokenizer_stay_as_they_were():
    model, tokenizer = toy(tie_word_embeddings=True)
    # Edited after it was untied by hand: tying again would undo the edit.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.train()
    model.model.layers[1].eval()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    settings = model.generation_config
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    config, kept = copy.deepcopy(model.config.to_dict()), copy.deepcopy(settings.to_dict())
    words, own = dict(tokenizer.get_vocab()), set(vars(model))

    measure(pair=(model, tokenizer), limit=2)

    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(p is weights[name][0] for name, p in after.items())
    assert all(torch.equal(*pair) for pair in weights.values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert settings.to_dict() == kept
    assert model.config.to_dict() == config
    assert set(vars(model)) == own
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert tokenizer.get_vocab() == words


@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_pad_token_is_one_that_the_model_knows_and_no_text_holds(eos):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, eos
    padded = padded_copy(tokenizer)
    assert padded.pad_token == (eos or "<s>")
    assert len(padded) == len(tokenizer)
    assert tokenizer.pad_token is None


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, tokenizer = toy()
    model.train()
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        measure(pair=(model, tokenizer), limit=2)
    assert model.training
    assert "tie_weights" not in vars(model)


def test_tasks_that_draw_are_seeded(tmp_path):
    folder = write(
        tmp_path, "rivers", text=CHOICE_TASK.replace('"{{{{question}}}}"', "!function draw.text")
    )
    (folder / "draw.py").write_text(
        "import random, numpy, torch\n"
        "def text(doc):\n"
        "    return f'{random.random()} {numpy.random.rand()} {torch.rand(1).item()}'\n"
    )
    ready = prepare_tasks(["rivers"], tasks_dir=folder)
    prompts = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        measure_prepared(*toy(), ready, progress=False)
        prompts.append(prompts_of(ready, "rivers"))
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 12


def test_random_states_and_logging_stay_as_they_were(tmp_path):
    folder = write(tmp_path, "rivers")
    code = "import logging, random\nlogging.basicConfig(level=10)\nrandom.seed(1)\n"
    (folder / "data.py").write_text(code + DATA)
    root, harness = logging.getLogger(), logging.getLogger("lm_eval")
    handlers, levels = list(root.handlers), (root.level, harness.level)
    # Without any handler, as in a plain program: basicConfig adds one only then.
    root.handlers[:] = []
    try:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        measure(["rivers", "locft_copying"], tasks_dir=folder, limit=2)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert root.handlers == []
        assert (root.level, harness.level) == levels
    finally:
        root.handlers[:] = handlers


def test_bars_and_warnings_of_the_harness(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a log file gets no bars
    text = CHOICE_TASK.replace("multiple_choice", "loglikelihood_rolling")
    text = text.replace("doc_to_target: answer", "doc_to_target: '{{{{question}}}}'")
    text += "process_results: !function score.results\n"
    write(tmp_path, "rolling", text=text)
    (tmp_path / "score.py").write_text("def results(doc, results):\n    return {'acc': 0.5}\n")
    tasks, options = [*OWN_TASKS, "rolling"], {"tasks_dir": tmp_path, "limit": 2}
    measure(tasks, **options)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    measure_capability(*toy(), tasks, **options)
    shown_bars = capfd.readouterr()
    assert shown_bars.out == ""
    for task in tasks:
        assert task in shown_bars.err


# Mistakes


def test_all_problems_are_one_error(tmp_path):
    with pytest.raises(CapabilityError) as caught:
        measure(
            ["locft_basic", "qwertz"], limit=0, num_fewshot=-1, tasks_dir=tmp_path / "none"
        )  # fmt: skip
    message = str(caught.value)
    assert issubclass(CapabilityError, LocFTError)
    for part in (
        "`limit=0` must be",
        "`num_fewshot=-1` must be",
        "none` is not a folder",
        "`locft_basic` is no task of the harness",
        "Did you mean `locft_basics`?",
        "`qwertz` is no task",
    ):
        assert message.count(part) == 1, part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"`tasks=\[\]` is empty"),
        ({"limit": 1.5}, "`limit=1.5` must be a whole number"),
        ({"limit": True}, "`limit=True` must be a whole number"),
        ({"batch_size": 0}, "`batch_size=0` must be 1 or more"),
    ],
    ids=str,
)
def test_settings_out_of_range(options, message):
    with pytest.raises(CapabilityError, match=message):
        measure(**options)


def test_a_folder_without_tasks_says_why(tmp_path):
    (tmp_path / "a.yaml").write_text("task: [a\n")
    (tmp_path / "b.yaml").write_text("model: b\n")
    with pytest.raises(CapabilityError, match=r"holds no task; .* no key `task`\. Give a folder"):
        measure(tasks_dir=tmp_path)


def test_data_that_cannot_be_fetched_is_told_at_once(tmp_path, unreachable):
    text = CHOICE_TASK.replace(
        "custom_dataset: !function data.load", "dataset_path: nobody-here/none-{name}"
    )
    for name in ("one", "two"):
        write(tmp_path, name, text=text)
    start = time.perf_counter()
    with pytest.raises(CapabilityError) as caught:
        measure(["one", "two", "locft_basics"], tasks_dir=tmp_path)
    # With the hub's retries it would be 23 seconds a task.
    assert time.perf_counter() - start < 15
    message = str(caught.value)
    for name in ("one", "two"):
        assert message.count(f"`{name}`: Couldn't reach 'nobody-here/none-{name}'") == 1
    assert "HF_HOME" in message
    assert "tasks_dir" in message
    assert len(message.split("\n")) == 4
    assert constants.HF_HUB_OFFLINE is False


def test_own_tasks_ask_no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the hub was asked"))
    measure(limit=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metric: acc", "metric: brier_score"), "has the metrics brier_score; a capability needs"),
        (("task:", "unsafe_code: true\ntask:"), "runs code that the model writes"),
        (("task:", "doc_to_image: [x]\ntask:"), "needs images or sound"),
        (("data.load", "data.nothing"), "has no function 'nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_task_of_no_use(tmp_path, change, message):
    folder = write(tmp_path, "rivers", text=CHOICE_TASK.replace(*change, 1))
    with pytest.raises(CapabilityError, match=f"`rivers`.*{message}"):
        measure(["rivers"], tasks_dir=folder)


def test_a_context_that_is_too_short(monkeypatch):
    model = toy_model(max_position_embeddings=8)
    with pytest.raises(CapabilityError, match="`locft_copying` generates up to 8 tokens"):
        measure(pair=(model, toy_tokenizer()))


def test_without_the_extra(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "lm_eval", None)
        with pytest.raises(MissingDependencyError, match=r'"locft_easyedit\[capability\]"'):
            measure()
    monkeypatch.delattr(lm_eval.tasks.TaskManager, "load")
    with pytest.raises(MissingDependencyError, match=r"lm_eval 0\.4\.13 or later"):
        measure()


@pytest.mark.slow
def test_the_names_of_the_paper_are_the_harness_own(monkeypatch, unreachable):
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FULL_INDEX)
    with pytest.raises(CapabilityError, match="Did you mean `gsm8k`") as caught:
        prepare_tasks([*PAPER_TASKS, *OWN_TASKS, "gsm9k"])
    assert len(str(caught.value).split("\n")) == 2  # all but the last are known


# The command


def shown(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_compares():
    entry = {"metric": "acc", "stderr": 0.05, "n": 9, "num_fewshot": 0, "all": {}}
    before = {"tasks": {"a": entry | {"value": 0.75}}, "mean": 0.75}
    after = {"tasks": {"a": entry | {"value": 0.5, "stderr": None}}, "mean": 0.5}
    rows = [
        line.split("│") for line in shown(capability_table({"x": before, "y": after})).split("\n")
    ]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) > 1]
    assert cells == [
        ["a", "acc", "9", "0.750 ± 0.050", "0.500", "-0.250"],
        ["mean", "", "", "0.750", "0.500", "-0.250"],
    ]
    assert "change" not in shown(capability_table({"x": before}))


def test_the_command_writes_what_it_shows(folder, capsys):
    assert main(["./toy0", "tasks=[rivers,locft_copying]", "tasks_dir=tasks", "limit=4"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((folder / "outputs" / "capability" / "capability.json").read_text())
    assert written["models"] == {"model": "./toy0"}
    expected = measure(["rivers", "locft_copying"], tasks_dir="tasks", limit=4)
    assert written["results"] == {"model": expected}
    assert written["settings"]["limit"] == 4
    assert f"{expected['mean']:.3f}" in printed
    assert "outputs/capability/capability.json" in printed
    assert "change" not in printed


def test_the_command_compares_with_the_original(folder, capsys, monkeypatch):
    import locft_easyedit.modeling.loading as models

    load, alive, together = models.load_causal_lm, [], []

    def watched(name, **options):
        gc.collect()
        together.append(sum(ref() is not None for ref in alive))
        model, tokenizer = load(name, **options)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(models, "load_causal_lm", watched)
    tasks = ["tasks=[locft_basics]", "limit=20", "output=out", "device=cpu"]
    assert main(["./toy1", "original=./toy0", *tasks]) == 0
    assert together == [0, 0]  # the first is gone when the second is loaded
    printed = capsys.readouterr().out
    written = json.loads((folder / "out" / "capability.json").read_text())
    assert written["models"] == {"before": "./toy0", "after": "./toy1"}
    for label, seed in (("before", 0), ("after", 1)):
        assert written["results"][label] == measure(["locft_basics"], toy(seed=seed), limit=20)
    change = written["results"]["after"]["mean"] - written["results"]["before"]["mean"]
    assert change != 0
    assert f"{change:+.3f}" in printed


def test_the_command_tells_of_nan(folder, capsys):
    model = toy_model()
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(folder / "broken")
    toy_tokenizer(pad_is_eos=True).save_pretrained(folder / "broken")
    assert main(["broken", "tasks=[locft_copying]", "limit=2", "output=out"]) == 0
    assert "model, locft_copying: no value, because the model gave NaN" in capsys.readouterr().out
    written = json.loads((folder / "out" / "capability.json").read_text())
    assert written["results"]["model"]["mean"] is None


def test_the_command_finds_mistakes_before_it_loads_a_model(folder, monkeypatch):
    import locft_easyedit.modeling.loading as models

    monkeypatch.setattr(models, "load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
    for arguments, error, message in (
        (["tasks=[nix]"], CapabilityError, "`nix` is no task"),
        (["dtype=int8"], HyperParamsError, "`dtype=int8` must be one of float32"),
        (["batch_size=0"], HyperParamsError, "`batch_size=0` must be 1 or more"),
        (["device=tpu9"], HyperParamsError, "is no device"),
        (["task=[a]"], HyperParamsError, "Did you mean `tasks`"),
    ):
        with pytest.raises(error, match=message):
            main(["./toy0", *arguments])


def test_help():
    assert all(name in help_of("capability") for name in (*PAPER_TASKS, *OWN_TASKS))
