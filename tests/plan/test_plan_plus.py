"""A plan of other forms (`forms`) and of a confined change (`preserve`): LocFT-BF+."""

import json
import math
from dataclasses import replace

import pytest
import torch
from cli.test_plan_command import YAML
from helpers.toys import (
    DOWN_PROJECTION,
    TOY_KINDS,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from test_candidates import CPU, LARGE, plan_for, sizes
from test_gpus import NODE, SMALL, TRAINED

from locft_easyedit.__main__ import main
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.errors import DataError, HyperParamsError, PlaceError
from locft_easyedit.hparams import LocFTBFHyperParams, shipped_yamls
from locft_easyedit.plan.cost import (
    EDITS_PREFIX,
    PROMPTS_PREFIX,
    adam_bytes,
    evaluation_flop,
    gradient_bytes,
    prefix_flop,
    step_flop,
    weight_bytes,
)
from locft_easyedit.plan.plan import make_plan
from locft_easyedit.plan.plan_tables import assumptions
from locft_easyedit.plan.setting import largest_share
from locft_easyedit.plan.units import GIB
from locft_easyedit.plan.workload import Workload
from locft_easyedit.training.session import EditSession

WIDTH = 14336  # of Llama-3-8B's down-projection's inputs
OUT = 4096  # and of its outputs
RUN, IN_FORM = 14.6, 14.6 + 25.0  # tokens that run of an edit, and of it in another form
FORMS = ["chat", "question_answer", "context"]
N_FORMS = 7  # texts in these forms beside the plain prompt


def plus(name="llama3-8b", **keys):
    return plan_for(name, **({"alg_name": "LocFT-BF+"} | keys))


def in_forms(name="llama3-8b", each=1, **keys):
    return plan_for(name, forms=FORMS, forms_per_epoch=each, **keys)


def confined(name="llama3-8b", **keys):
    return plan_for(name, **({"preserve": ["sampled", "neighbours"]} | keys))


# Against a real session


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_what_a_session_of_the_preset_holds(dtype, tmp_path):
    toy_model("llama").config.save_pretrained(tmp_path)
    hparams = toy_hparams(
        alg_name="LocFT-BF+", forms=FORMS[1:], preserve=["neighbours"], dtype=dtype,
        prefix_cut="matrix", forms_per_epoch=4,
        model_name=str(tmp_path), device="cpu", health_check=False,
    )  # fmt: skip
    model = toy_model("llama").to(getattr(torch, dtype))
    with EditSession(model, toy_tokenizer(), toy_requests(12), hparams, progress=False) as session:
        texts, store = session.training_texts, session._runner.prefix.store
        change = session._protection.change
        assert len(texts.texts) == 12 * 5
        assert session.training_texts.variants.most == 5
        own = tokenize_edits(toy_tokenizer(), session.edits.edits, append_eos=True)
        longer = (texts.texts.lengths.sum() - own.lengths.sum()) / 48 - own.lengths.mean()
        assert abs(longer) > 0.5  # else nothing shows that it counts
        work = Workload.from_hparams(
            hparams, 12, tokens=float(own.lengths.mean()), form_longer=float(longer)
        )
        plan = make_plan(hparams, work, CPU)
        told = sizes(plan, "host")

        size = model.dtype.itemsize
        assert store.width == plan.shapes.cuts["matrix"]
        assert told[EDITS_PREFIX] == pytest.approx(store.n_tokens * store.width * size)
        assert plan.work.step_tokens * 12 == pytest.approx(
            own.input_lengths.sum() + 12 * 4 * (own.input_lengths.mean() + longer)
        )

        def held(tensors):
            return sum(t.numel() * t.element_size() for t in tensors)

        assert told["filters of inputs"] == held(change._filters.values()) == 64 * 64 * 4
        running = [s for n, s in change._running.items() if s is not change._filters[n]]
        assert told.get("filters as they run", 0) == held(running)
        assert told["the change's matrices"] == held(change._a.values())
        assert told["their values at the beginning"] == held(change.weights.original.values())
        assert told["original values"] == held(change.original.values())
        apart = [m for m in change.weights.masters if all(m is not a for a in change._a.values())]
        assert told.get("float32 masters", 0) == held(apart)


@pytest.mark.parametrize("kind", [kind for kind in TOY_KINDS if kind != "mixtral"])
def test_where_the_change_is_folded(kind, tmp_path):
    toy_model(kind).config.save_pretrained(tmp_path)
    hparams = toy_hparams(
        rewrite_module_tmp=DOWN_PROJECTION[kind], preserve=["neighbours"], prefix_cut="matrix",
        model_name=str(tmp_path), health_check=False,
    )  # fmt: skip
    shapes = make_plan(hparams, Workload.from_hparams(hparams, 6), LARGE).shapes
    with EditSession(
        toy_model(kind), toy_tokenizer(), toy_requests(6), hparams, progress=False
    ) as session:
        cut = session._runner.prefix.cut
        assert cut.kind == "matrix"
        assert shapes.folds("matrix") == (cut.fold is not None) == ("gemma" not in kind)
    assert not shapes.folds("mlp")
    [width] = shapes.confined.inputs.values()
    [s] = session._protection.change._filters.values()
    assert s.shape == (width, width)


# Forms


def test_forms_are_recorded_once_and_some_run_in_a_step():
    machine = replace(LARGE, prefix_gpu=40 * GIB)
    for k in (1, 3):
        plan, alone = in_forms(each=k, machine=machine), plan_for(machine=machine)
        told, before = sizes(plan), sizes(alone)
        recorded = RUN + N_FORMS * IN_FORM
        assert told[EDITS_PREFIX] == pytest.approx(3000 * recorded * (4096 + WIDTH) * 2)
        assert told[PROMPTS_PREFIX] == before[PROMPTS_PREFIX]
        assert plan.work.eval_tokens == alone.work.eval_tokens
        for name in ("Adam's moments", "gradients", "original values", "float32 masters", "weights",
                     "activations without gradients", "logits of evaluation"):  # fmt: skip
            assert told[name] == before[name]
        # The same parts of a token, in rows that hold a step's texts.
        rows = math.ceil(100 * (RUN + k * IN_FORM) / 64)
        scored = (1 + k) * 4.3 / (RUN + k * IN_FORM)
        norm, mlp = 4 * 4096 + 4, 3 * WIDTH * 2
        attention = 4 * 4096 * 2 + 4 * 32 + 64 * 2
        token = (4096 + WIDTH) * 2 + 9 * (2 * norm + mlp + attention) - (1 - scored) * (mlp + norm)
        # At work besides: gradients in the last MLP, or in its attention when the MLP's are gone.
        token += max(scored * mlp, attention + 4096 * 2 - scored * mlp)
        assert told["activations"] == pytest.approx(rows * 64 * token)
        n_scored = 100 * (1 + k) * 4.3
        chunk = min(n_scored * 128256, 2**26)
        assert told["cross-entropy"] == pytest.approx(chunk * 6 + 2 * n_scored * 4096 * 2)


def test_forms_on_the_host():
    plan, alone = (sizes(p, "host") for p in (in_forms(machine=NODE), plan_for(machine=NODE)))
    assert plan["other forms"] == 8 * 3000 * N_FORMS * 430
    assert plan["other forms while they are made"] == 8 * 3000 * N_FORMS * 2800
    assert plan["requests and tokens"] == alone["requests and tokens"]
    assert "other forms" not in alone


def test_work_of_forms_by_hand():
    plan = in_forms(each=2)
    alone = plan_for()
    tokens = RUN + 2 * IN_FORM
    matrix, layer = TRAINED, 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * TRAINED
    scored, attention, late = 3 * 4.3 / tokens, 4 * 64 * 4096, 4096 * 4096 + 3 * matrix
    token = 4 * matrix + 9 * (4 * layer + 3 * attention) - (1 - scored) * 4 * late
    token += 4 * scored * 4096 * 128256
    assert step_flop(plan.chosen.run) == pytest.approx(100 * tokens * token)
    # A token of the prefix and one of evaluation cost what they cost.
    below, upper = (
        [of(p) for p in (plan, alone)]
        for of in (
            lambda p: prefix_flop(p.shapes, p.work, "matrix"),
            lambda p: evaluation_flop(p.shapes, p.work),
        )
    )
    assert below[0] == below[1]
    assert upper[0] == upper[1]
    recorded = (RUN + N_FORMS * IN_FORM) / RUN
    assert plan.phases[1].flop == pytest.approx(alone.phases[1].flop * recorded)
    assert [p.flop for p in plan.phases[3:]] == [p.flop for p in alone.phases[3:]]
    # More chunks of logits read the head more often.
    chunks = [math.ceil(n * 430 * 128256 / 2**26) for n in (1, 3)]
    more = weight_bytes(plan.chosen.run)
    more -= weight_bytes(alone.chosen.run)
    assert more == 2 * 2 * (chunks[1] - chunks[0]) * 4096 * 128256


def test_the_check_of_all_edits():
    plan, without = in_forms(repairs=1), in_forms()
    assert any("`repairs` train again" in line for line in assumptions(plan))
    assert not any("`repairs`" in line for line in assumptions(without))
    checking = plan.phases[3]
    assert checking.name == "check of all edits"
    assert [p.name for p in plan.phases if p is not checking] == [p.name for p in without.phases]
    # Two operations a weight, the end of the last layer and the head at scored tokens alone.
    layer, late = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * TRAINED, 4096 * 4096 + 3 * TRAINED
    tokens, scored = 3000 * (RUN + N_FORMS * IN_FORM), 3000 * (1 + N_FORMS) * 4.3
    flop = tokens * (10 * (2 * layer + 4 * 64 * 4096) - 2 * late)
    assert checking.flop == pytest.approx(flop + scored * 2 * (late + 4096 * 128256))
    on_disk = in_forms(repairs=1, machine=replace(LARGE, prefix_gpu=0, prefix_host=0), cut="mlp")
    assert on_disk.phases[3].disk == on_disk.phases[1].disk > 0
    assert [Workload.from_hparams(toy_hparams(**keys), 100).checked for keys in (
        {}, {"repairs": 1}, {"alg_name": "LocFT-BF+"}, {"alg_name": "LocFT-BF+", "repairs": 0},
    )] == [False, True, True, False]  # fmt: skip


def test_an_epoch_reads_a_part_of_the_forms_from_disk():
    machine = replace(LARGE, prefix_gpu=0, prefix_host=0)
    plan = in_forms(machine=machine, cut="mlp")
    assert plan.phases[1].disk == pytest.approx(3000 * (RUN + N_FORMS * IN_FORM) * 4096 * 2)
    assert plan.phases[2].disk == pytest.approx(25 * 3000 * (RUN + IN_FORM) * 4096 * 2)


def test_micro_batches_count_edits():
    plan, alone = in_forms(micro_batch_size=25), plan_for(micro_batch_size=25)
    assert plan.chosen.setting.micro_batch_size == 25
    assert plan.step().seconds["launches"] == alone.step().seconds["launches"]
    lora = {"tuning": "lora", "lora_rank": 16}
    rows = math.ceil(25 * (RUN + IN_FORM) / 64)
    told = sizes(in_forms(micro_batch_size=25, **lora))
    assert told["LoRA's inputs in float32"] == 4 * rows * 64 * WIDTH


def test_ranks_own_texts():
    plan = in_forms(n=100_000, machine=NODE, each=3)
    share = largest_share(100_000 * (1 + N_FORMS), 400, 8, 25_000)
    assert plan.step().share == share.mean / 4
    assert plan.chosen.setting.micro_batch_size == math.ceil(share.most / 4)
    # More texts are dealt out more evenly.
    assert 12.5 < plan.step().share < plan_for(n=100_000, machine=NODE).step().share - 1


# A confined change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_memory_of_a_confined_change_by_hand(dtype):
    size = 4 if dtype == "float32" else 2
    plan, full = confined(dtype=dtype), plan_for(dtype=dtype)
    gpu, before = sizes(plan), sizes(full)
    when = {p.name: p.phases for p in plan.chosen.parts if p.place == "gpu"}
    n = TRAINED
    assert gpu["filters of inputs"] == 4 * WIDTH**2
    assert gpu["filters of outputs"] == 4 * OUT**2
    assert gpu["the change's matrices"] == gpu["their values at the beginning"] == size * n
    assert gpu["original values"] == gpu["gradients"] == size * n
    assert gpu["Adam's moments"] == 8 * n
    if size == 2:
        assert gpu["filters as they run"] == 2 * (WIDTH**2 + OUT**2)
        assert gpu["float32 masters"] == gpu["float32 gradients"] == 4 * n
        assert gpu["a matrix in float32, to add the change to"] == 4 * n
        assert when["float32 masters"] == ("prefix", "train", "evaluate")
        assert when["float32 gradients"] == ("train",)
    else:
        assert not [name for name in gpu if "as they run" in name or "float32" in name]
    for name in ("filters of inputs", "the change's matrices", "original values"):
        assert when[name] == ("prefix", "train", "evaluate")
    # The recorded width is that of a trained matrix: W x and S x stand for nothing and x.
    same = ("weights", "activations", "cross-entropy", EDITS_PREFIX, PROMPTS_PREFIX)
    assert all(gpu[name] == before[name] for name in same)
    assert gpu["inputs that the filters have passed"] == 0
    assert sizes(confined(dtype=dtype, cut="mlp"))["inputs that the filters have passed"] == (
        size * 23 * 64 * WIDTH
    )


def test_memory_of_preparing_by_hand():
    def preparing(plan, place):
        [part] = [p for p in plan.chosen.parts if (p.name, p.place) == (NAME, place)]
        assert part.phases == ("prefix",)
        return part.bytes / WIDTH**2

    NAME = "measuring what is preserved"
    a = TRAINED / WIDTH**2  # of W's numbers in those of S
    b = OUT**2 / WIDTH**2
    stays = 4 + 2 + 10 * a + 6 * b
    plan = plus(n=1000)
    # Five moments where the matrix is (sampled text, chats, the prompts in the text, neighbours and
    # what leads up to ends), their sum, and 48 bytes a number of the decomposition.
    assert preparing(plan, "gpu") == pytest.approx(5 * 4 + 4 + 48 - stays)
    # The first four are held when the edits' own texts are run.
    answered = 64 * plan.work.targets  # tokens where a target is predicted, of 64 edits
    keys = 4 * answered * (1 + N_FORMS) / WIDTH
    assert preparing(plan, "host") == pytest.approx(4 * 4 + 4 + keys)
    assert preparing(plus(n=1000, machine=NODE), "host") == pytest.approx(8 * (20 + keys))
    # Both kinds of sampled text, their mean, and both of one matrix.
    alone = confined(n=1000, preserve=["sampled"])
    assert preparing(alone, "host") == pytest.approx(2 * 4 + 4 + 2 * 4)
    assert preparing(alone, "gpu") == pytest.approx(2 * 4 + 4 + 48 - stays)
    assert preparing(confined(preserve=["a.txt"]), "host") == pytest.approx(4 + 4 + 4)
    others = plus(preserve=["a.txt", "neighbours", "b.txt"], n=1000)
    assert preparing(others, "host") == pytest.approx(2 * 4 + 4 + 4 + 4)  # when b.txt is measured
    assert preparing(others, "gpu") == pytest.approx(4 * 4 + 4 + 48 - stays)
    # Without other forms the own prompts are run for what leads up to their ends.
    near = confined(preserve=["a.txt", "neighbours"], n=1000)
    keys = 4 * answered / WIDTH
    assert preparing(near, "host") == pytest.approx(2 * 4 + 4 + keys)
    # Prompts that are kept exactly have no moments.
    exact = confined(preserve=["folder/a.jsonl"])
    assert preparing(exact, "gpu") == pytest.approx(24 - (stays - 6 * b))
    assert preparing(exact, "host") == 0
    on_cpu = confined(machine=CPU, preserve=["sampled", "neighbours"], dtype="float32")
    assert preparing(on_cpu, "host") == pytest.approx(4 * 4 + 4 + 48 - (4 + 12 * a + 4 * b))


def test_outputs_that_are_wider_than_inputs_take_the_decomposition():
    up = {"rewrite_module_tmp": "model.layers.{}.mlp.up_proj.weight", "preserve": ["sampled"]}
    plan = confined(n=1000, **up)
    [part] = [p for p in plan.chosen.parts if (p.name, p.place) == ("measuring what is preserved",
                                                                    "gpu")]  # fmt: skip
    s, t, n = OUT**2, WIDTH**2, TRAINED  # the matrix is that of the down-projection, transposed
    stays = 4 * (s + t) + 2 * (s + t) + 10 * n
    assert part.bytes == pytest.approx(4 * (s + t) + 48 * t - stays)


def test_sums_of_narrow_matrices_are_in_float64():
    # Where a batch of tokens is more than a decomposition.
    plan = confined("smollm2-135m", n=100, machine=CPU, layers=[20])
    width, n = 1536, 1536 * 576
    [part] = [p for p in plan.chosen.parts if p.name == "measuring what is preserved"]
    [passing] = {p.bytes for p in plan.chosen.parts if p.name == "activations without gradients"}
    a_layer = passing / plan.work.cells(64 * plan.work.run_tokens)
    # Three moments are held when the last two are summed up, and a product is added.
    batch = 2 * 8 * width**2 + 4 * width**2 + 4096 * (a_layer + 4 * width)
    # More is taken by what is run back through ten layers, from logits and what is made of them.
    back = 512 * (10 * a_layer + 49152 * (12 + 4)) + 12 * 576**2
    assert back > batch
    expected = 3 * 4 * width**2 + back - (4 * width**2 + 12 * n + 4 * 576**2)
    assert part.bytes == pytest.approx(expected)


def test_work_of_a_confined_change_by_hand():
    plan, full = confined(), plan_for()
    setting, work = plan.chosen.setting, plan.work
    both = TRAINED + WIDTH**2

    def more(of, **changes):
        one = replace(setting, **changes)
        return of(replace(plan.chosen.run, setting=one)) - of(replace(full.chosen.run, setting=one))

    # A step multiplies with A in place of W, and with T; W x and S x are left to the prefix.
    products = 100 * RUN * 2 * 2 * OUT**2
    assert more(step_flop) == pytest.approx(products)
    assert more(weight_bytes) == 2 * 2 * OUT**2
    assert prefix_flop(plan.shapes, work, "matrix") - prefix_flop(
        full.shapes, work, "matrix"
    ) == pytest.approx(2 * both)
    assert prefix_flop(plan.shapes, work, "mlp") == prefix_flop(full.shapes, work, "mlp")
    assert evaluation_flop(plan.shapes, work) == evaluation_flop(full.shapes, work)
    # Above another cut the products with S and A come on top, forward alone.
    assert more(step_flop, cut="mlp") == pytest.approx(100 * RUN * 2 * both + products)
    assert more(weight_bytes, cut="layer") == 2 * (both + 2 * OUT**2)
    for of in (adam_bytes, gradient_bytes):
        assert of(plan.chosen.run) == of(full.chosen.run)


def test_matrices_further_up_are_not_folded():
    keys = {"layers": [22, 25]}
    plan, full = confined(**keys), plan_for(**keys)
    both = TRAINED + WIDTH**2
    assert plan.chosen.setting.cut == "matrix"
    more = step_flop(plan.chosen.run) - step_flop(full.chosen.run)
    # The first one's T, and both A, S and T of the other.
    assert more == pytest.approx(100 * RUN * 2 * 2 * (both + 2 * OUT**2))
    read = weight_bytes(plan.chosen.run) - weight_bytes(full.chosen.run)
    assert read == 2 * 2 * (both + 2 * OUT**2)
    told = sizes(plan)
    assert told["inputs that the filters have passed"] == 2 * 23 * 64 * WIDTH
    assert told["filters of inputs"] == 2 * 4 * WIDTH**2


def test_a_norm_after_the_block_leaves_nothing_to_fold():
    plan, full = confined("gemma-2-9b"), plan_for("gemma-2-9b")
    setting = plan.chosen.setting
    assert setting.cut == "matrix"
    [width] = plan.shapes.confined.inputs.values()
    [n] = plan.shapes.trained.values()
    more = step_flop(plan.chosen.run) - step_flop(full.chosen.run)
    t = (n // width) ** 2
    assert more == pytest.approx(100 * RUN * 2 * (n + width**2 + 2 * t))
    assert prefix_flop(plan.shapes, plan.work, "matrix") == prefix_flop(
        full.shapes, full.work, "matrix"
    )


def test_inputs_of_transposed_matrices():
    [width] = confined("gpt2-xl").shapes.confined.inputs.values()
    assert width == 6400


# What goes with it


def test_a_confined_change_needs_the_whole_model():
    plan = plus("qwen2.5-72b", machine=SMALL, stream_frozen=None)
    assert {c.setting.streamed for c in plan.candidates} == {False}
    assert {c.setting.layout for c in plan.candidates} == {"copies", "model_parallel"}
    alone = in_forms("qwen2.5-72b", machine=SMALL)
    assert alone.chosen.setting.streamed
    lowest = confined("qwen2.5-72b", machine=SMALL, layers=[0], stream_frozen=None)
    assert "fsdp" not in {c.setting.layout for c in lowest.candidates}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"streamed": True}, r"`stream_frozen=True` does not go with `preserve=\[sampled,neigh"),
        ({"stream_frozen": True}, r"Give stream_frozen=false, or preserve=\[\]\."),
        ({"shard_frozen": True}, r"`shard_frozen=True` does not go with .*shard_frozen=false"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_preserve(keys, message):
    with pytest.raises(HyperParamsError, match=message):
        plus(**keys)
    assert plus(**keys, preserve=[]).chosen is not None
    assert plus(**keys, tuning="lora").shapes.confined is None


def test_both_are_told_at_once():
    with pytest.raises(HyperParamsError, match="stream_frozen=True") as info:
        plus(stream_frozen=True, shard_frozen=True)
    assert "`shard_frozen=True`" in str(info.value)


def test_wrong_sources_and_places():
    with pytest.raises(DataError, match=r"`text\.pdf` is no source\. Give `sampled`"):
        confined(preserve=["sampled", "text.pdf"])
    with pytest.raises(PlaceError, match="a change of it cannot be confined"):
        confined(rewrite_module_tmp="model.layers.{}.input_layernorm.weight")


# What is said


def test_assumptions_of_the_preset():
    text = "\n".join(assumptions(plus()))
    assert "7 other forms of each edit's prompt are recorded with it, 25 tokens longer" in text
    assert "an epoch trains 1 beside it." in text
    assert "measuring for `preserve` (sampled, neighbours) is left out" in text
    assert "once per model and place" in text
    text = "\n".join(assumptions(plan_for()))
    assert "other form" not in text
    assert "preserve" not in text


def test_the_preset_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("--config-name", "llama3-8b", "n=1000", "batch_size=10", "gpu=80GiB")
    assert main(["plan", *arguments, "alg_name=LocFT-BF+", "output=plan.json"]) == 0
    out = capsys.readouterr().out
    assert "filters of inputs" not in out  # memory by part is for whoever asks
    assert main(["plan", *arguments, "alg_name=LocFT-BF+", "verbose=true"]) == 0
    out = capsys.readouterr().out
    for part in (
        "1,000, 10 a step, 25 epochs, in 8 forms",
        "sampled, neighbours",
        "291,800 of edits, 58,400 of prompts",
        "through a confined change",
        "filters of inputs",
        "measuring what is preserved",
    ):
        assert part in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["forms"] == {"forms": 7, "forms_per_epoch": 1, "form_longer": 25.0}
    assert found["preserve"] == ["sampled", "neighbours"]
    [width] = found["model"]["confined"]["inputs"].values()
    assert width == WIDTH
    assert main(["plan", *arguments, "forms_per_epoch=2", "output=plan.json"]) == 0
    assert "in 8 forms" not in capsys.readouterr().out  # none without `forms`
    forms = "forms=[chat,context,question_answer]"
    assert main(["plan", *arguments, forms, "output=plan.json", "verbose=true"]) == 0
    out = capsys.readouterr().out
    assert "1,000, 10 a step, 25 epochs, in 8 forms" in out
    assert "291,800 of edits, 58,400 of prompts" in out
    assert "an epoch trains 1 beside it." in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["forms"] == {"forms": 7, "forms_per_epoch": 1, "form_longer": 25.0}
    assert main(["plan", *arguments, forms, "forms_per_epoch=0.5", "verbose=true"]) == 0
    assert "an epoch trains 0.5 beside it." in capsys.readouterr().out
    assert main(["plan", *arguments]) == 0
    assert "other form" not in capsys.readouterr().out
    status = main(["plan", *arguments, "alg_name=LocFT-BF+", "stream_frozen=true"])
    assert status == 2
    assert "`stream_frozen=True` does not go with `preserve=" in capsys.readouterr().err


def test_a_yaml_of_the_preset(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    toy_model("llama").config.save_pretrained(tmp_path / "toy")
    (tmp_path / "mine.yaml").write_text(YAML.replace("LocFT-BF", "LocFT-BF+") + "preserve: [a.txt]")
    assert main(["plan", "--config-name", "mine.yaml", "n=10", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "in 8 forms" in out
    assert "a.txt" in out  # which need not be there


def test_little_room_leaves_out_nothing():
    # Without what measuring takes it would fit.
    machine = replace(LARGE, gpu=22 * GIB)
    assert plan_for(machine=machine, streamed=False).chosen is not None
    plan = confined(machine=machine)
    assert plan.chosen is None
    assert all("measuring what is preserved" in c.reason for c in plan.candidates)


@pytest.mark.parametrize(("n", "size"), [(60, 6), (5000, 100)])
def test_the_mini_batches_of_few_edits(n, size):
    read = LocFTBFHyperParams.from_hparams(shipped_yamls()["LocFT-BF+/llama3-8b"])
    assert Workload.from_hparams(read, n).batch_size == size
