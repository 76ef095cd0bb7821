"""What fits which machine: memory, tiers, work and time, against naive sums."""

from dataclasses import replace

import pytest
from helpers.toys import toy_hparams, toy_model

from locft_easyedit.errors import HyperParamsError, ModelError, PlaceError
from locft_easyedit.hparams import LocFTBFHyperParams, hparams_folder
from locft_easyedit.plan.cost import (
    EDITS_PREFIX,
    PROMPTS_PREFIX,
    evaluation_flop,
    prefix_flop,
    step_flop,
)
from locft_easyedit.plan.memory_parts import PHASES, Part, cross_entropy, peak
from locft_easyedit.plan.plan import make_plan
from locft_easyedit.plan.plan_tables import assumptions
from locft_easyedit.plan.setting import Setting
from locft_easyedit.plan.units import GIB, bytes_text, flop_text, parse_size, seconds_text
from locft_easyedit.plan.workload import Machine, Workload

LARGE = Machine(gpu=80 * GIB, host=128 * GIB, disk=500 * GIB)
H = hparams_folder()


def plan_for(
    name="llama3-8b", n=3000, machine=LARGE, *, work=None, streamed=None, cut=None, **keys
):
    keys = {"stream_frozen": streamed, "prefix_cut": cut} | keys
    hparams = LocFTBFHyperParams(**LocFTBFHyperParams.from_hparams(H / name).to_dict() | keys)
    return make_plan(hparams, Workload.from_hparams(hparams, n, **(work or {})), machine)


def sizes(plan, place="gpu"):
    """Returns the chosen parts of one place by name."""
    return {p.name: p.bytes for p in plan.chosen.parts if p.place == place}


# Memory


def test_memory_of_llama_3_8b_by_hand():
    plan = plan_for()
    assert plan.dtype == "bfloat16"  # a GPU's default
    n, size = 58_720_256, 2
    gpu = sizes(plan)
    assert gpu["weights"] == 8_030_261_248 * size
    assert gpu["float32 masters"] == gpu["float32 gradients"] == 4 * n
    assert gpu["Adam's moments"] == 8 * n
    assert gpu["gradients"] == gpu["original values"] == 2 * n
    tokens = 3000 * 14.6
    assert gpu[EDITS_PREFIX] == pytest.approx(tokens * (4096 + 14336) * size)
    assert gpu[PROMPTS_PREFIX] == pytest.approx(4 * tokens * 4096 * size)
    # 100 edits of 14.6 tokens fill 23 rows of 64. Nine layers above the cut; in the last one the
    # MLP and its norm run at 4.3 of 14.6 positions, and its gradients are at work first.
    norm, mlp = 4 * 4096 + 4, 3 * 14336 * size
    attention = 4 * 4096 * size + 4 * 32 + 64 * size
    layer = 2 * norm + attention + mlp
    scored = 4.3 / 14.6
    token = (4096 + 14336) * size + 9 * layer - (1 - scored) * (mlp + norm) + scored * mlp
    assert gpu["activations"] == pytest.approx(23 * 64 * token)
    assert sizes(plan, "host")["weights on their way to the GPU"] == gpu["weights"]


def test_float32_has_no_masters():
    gpu = sizes(plan_for(dtype="float32"))
    assert "float32 masters" not in gpu
    assert "float32 gradients" not in gpu
    assert gpu["gradients"] == gpu["original values"] == 4 * 58_720_256
    assert gpu["weights"] == 4 * 8_030_261_248


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lora_trains_less(dtype):
    size = 4 if dtype == "float32" else 2
    full = plan_for(dtype=dtype)
    plan = plan_for(dtype=dtype, tuning="lora", lora_rank=16)
    n, m = 4096 * 14336, 16 * (4096 + 14336)
    gpu = sizes(plan)
    assert gpu["LoRA's matrices"] == gpu["their values at the beginning"] == 4 * m
    assert gpu["Adam's moments"] == 8 * m
    assert gpu["gradients"] == 4 * m
    assert gpu["original values"] == size * n
    for name in ("float32 masters", "float32 gradients"):
        assert gpu.get(name) == (4 * m if dtype == "float16" else None)
    if size == 2:
        assert gpu["LoRA's inputs in float32"] == 4 * 23 * 64 * 14336
        assert gpu["a matrix in float32, to add LoRA to"] == 4 * n
    same = ("weights", "activations", "cross-entropy", EDITS_PREFIX)
    assert all(gpu[name] == sizes(full)[name] for name in same)
    # Its gradient costs 2 operations a weight and token, LoRA 6 a number of A and B.
    flop = [step_flop(p.chosen.run) for p in (full, plan)]
    assert flop[0] - flop[1] == pytest.approx(100 * 14.6 * (2 * n - 6 * m))


def test_lora_of_several_matrices_and_of_transposed_ones():
    template = ["transformer.h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_fc.weight"]
    keys = {"rewrite_module_tmp": template, "layers": [40, 41], "tuning": "lora", "lora_rank": 8}
    lora = plan_for("gpt2-xl", **keys).shapes.lora
    assert lora.trained == 4 * 8 * (1600 + 6400)
    assert lora.inputs == 2 * (1600 + 6400)
    assert lora.largest == 1600 * 6400


def test_a_plan_for_a_lora_that_cannot_be():
    with pytest.raises(PlaceError, match="`lora_rank=5000` is above 4096"):
        plan_for(tuning="lora", lora_rank=5000)


def test_streamed_model_keeps_what_is_above():
    plan = plan_for("qwen2.5-72b", n=100_000)
    assert plan.chosen.setting.streamed
    layer = (72_706_203_648 - 2 * 152064 * 8192 - 8192) // 80
    above = 25 * layer + 8192 + 152064 * 8192
    gpu, host = sizes(plan), sizes(plan, "host")
    assert gpu["weights"] == 2 * above
    # Two buffers as large as the embedding, which is larger than a layer.
    assert gpu["buffers of streamed layers"] == 2 * 2 * 152064 * 8192
    assert host["buffers of streamed layers"] == gpu["buffers of streamed layers"]
    assert "weights on their way to the GPU" not in host


def test_a_head_that_is_the_embedding_stays():
    plan = plan_for("gpt2-xl", streamed=True)
    assert sizes(plan)["weights"] == 2 * plan.shapes.upper
    assert plan.shapes.upper > 50257 * 1600


def test_a_cpu_has_one_memory():
    machine = Machine(gpu=None, host=16 * GIB, disk=10 * GIB)
    plan = plan_for("smollm2-135m", n=100, machine=machine)
    assert {p.place for p in plan.chosen.parts} == {"host"}
    assert sizes(plan, "host")["weights"] == 4 * 134_515_008
    assert plan.dtype == "float32"  # a CPU's default
    assert sizes(plan, "host")["kept by the C library"] > 0
    assert sizes(plan, "host")["tokenizer"] == 49152 * 950
    assert list(plan.chosen.budgets) == ["host", "disk"]
    assert plan.peaks()["gpu"] == 0
    streamed = plan_for("smollm2-135m", n=100, machine=machine, streamed=True)
    buffers = [p for p in streamed.chosen.parts if p.name == "buffers of streamed layers"]
    assert len(buffers) == 1


CPU = Machine(gpu=None, host=64 * GIB, disk=10 * GIB)


def test_weights_of_a_cpu_are_mapped_where_nothing_is_converted():
    def when(name, dtype, machine=CPU):
        plan = plan_for(name, n=100, machine=machine, dtype=dtype)
        place = "host" if machine.gpu is None else "gpu"
        [weights] = [p for p in plan.chosen.parts if (p.name, p.place) == ("weights", place)]
        return weights.phases

    assert when("llama3.2-3b", "bfloat16") == PHASES[1:]
    assert when("llama3.2-3b", "float32") == PHASES
    assert when("llama3.2-3b", "bfloat16", LARGE) == PHASES


def test_kernels_of_a_cpu_in_half_precision():
    def kernels(n=100, **work):
        plan = plan_for(
            "smollm2-135m", n=n, machine=CPU, dtype="bfloat16", batch_size=100, work=work
        )
        found = sizes(plan, "host")
        return [
            found[f"kernels for {what}"] / (kib * 1024)
            for what, kib in (("batches", 350), ("fixed shapes", 350), ("mini-batches", 650))
        ]

    # Five matrices of different shapes; a shape for each 8 of 2 * 19 tokens, and for each of the 32
    # that are generated; one mini-batch.
    assert kernels(tokens=20.0) == pytest.approx([8 * 5, (2 * 19 / 8 + 32) * 5, 8])
    assert kernels(tokens=20.0, evaluate=False) == [8 * 5, 0, 8]
    # As many numbers of scored tokens as there are mini-batches, up to what chance makes of them.
    assert kernels(n=300, epochs=2, tokens=20.0)[2] == 2 * 3 * 8
    assert kernels(n=300, epochs=50, tokens=20.0)[2] == pytest.approx(2 * 4.3 * 10 * 8)
    assert sum(kernels(tokens=1000.0)) == 1024
    assert not any("kernels" in p.name for p in plan_for(machine=CPU).chosen.parts)
    assert not any("kernels" in p.name for p in plan_for().chosen.parts)


def test_large_blocks_are_not_kept_by_the_c_library():
    def held(batch_size, **work):
        keys = {"machine": CPU, "dtype": "float32", "cut": "matrix", "work": work}
        plan = plan_for("smollm2-135m", n=10**5, batch_size=batch_size, **keys)
        when = {p.phases: p.bytes for p in plan.chosen.parts if p.name == "kept by the C library"}
        found = sizes(plan, "host")
        # Evaluation takes what it needs from what training has freed.
        own = found["activations without gradients"] + found["logits of evaluation"]
        freed = when["train",] / 0.5
        assert when["evaluate",] == pytest.approx(max(0.5 * freed, 1.5 * freed - own))
        assert (freed > own) == (batch_size > 100)  # else there is little to take from
        return when["train",] / found["activations"]

    assert held(100) == held(200) == pytest.approx(0.5)
    # 92 rows of 64 tokens with 1,536 numbers are more than 32 MiB, those of 576 are less.
    assert 0 < held(400) < 0.5


def test_the_last_layer_alone_runs_at_scored_positions():
    def activations(cut):
        plan = plan_for(layers=[31], cut=cut)
        [saved] = {p.bytes for p in plan.chosen.parts if p.name == "activations"}
        return saved / (23 * 64)

    scored, mlp, norm = 4.3 / 14.6, 3 * 14336 * 2, 4 * 4096 + 4
    assert activations("matrix") == pytest.approx((4096 + 14336) * 2 + scored * mlp)
    assert activations("mlp") == pytest.approx(4096 * 2 + scored * (norm + 2 * mlp))


def test_peak_is_the_fullest_phase():
    parts = [
        Part("a", "gpu", 5.0),
        Part("b", "gpu", 3.0, ("load",)),
        Part("c", "gpu", 2.0, ("train",)),
        Part("d", "gpu", 4.0, ("train", "evaluate")),
        Part("e", "host", 100.0),
    ]
    assert peak(parts, "gpu") == 5 + 2 + 4
    assert peak(parts, "host") == 100
    assert peak(parts, "disk") == 0
    assert PHASES == ("load", "prefix", "train", "evaluate")


def test_cross_entropy_works_in_chunks():
    plan = plan_for()
    work = replace(plan.work, targets=10.0)

    def taken(dtype, n):
        setting = Setting(dtype, False, "matrix", n)
        return cross_entropy(replace(plan.chosen.run, setting=setting, work=work))

    small, large = (taken("float32", n) for n in (10, 10_000))
    hidden = 2 * 10 * 4096 * 4
    assert small == 10 * 10 * 128256 * 4 + 10 * hidden
    assert large == 2**26 * 4 + 10_000 * hidden
    half = taken("bfloat16", 10_000)
    assert half == 2**26 * 6 + 10_000 * hidden / 2


@pytest.mark.parametrize("place", ["mlp", "layer"])
def test_an_earlier_cut_keeps_more_activations(place):
    by_cut = {cut: sizes(plan_for(cut=cut))["activations"] for cut in ("matrix", place)}
    assert by_cut[place] > by_cut["matrix"]
    assert sizes(plan_for(cut="layer"))["activations"] >= by_cut[place]


# Tiers


def test_tiers_fill_in_order():
    machine = replace(LARGE, prefix_gpu=GIB, prefix_host=2 * GIB)
    plan = plan_for(machine=machine, cut="matrix", dtype="float32")
    edits = 3000 * 14.6 * (4096 + 14336) * 4
    assert plan.chosen.edits["gpu"] == GIB
    assert plan.chosen.edits["host"] == pytest.approx(min(edits - GIB, 2 * GIB))
    on_disk = sizes(plan, "disk")
    assert on_disk.get(EDITS_PREFIX, 0) == pytest.approx(max(0, edits - 3 * GIB))
    assert sum(plan.chosen.edits.values()) == pytest.approx(edits)
    total = edits + 4 * 3000 * 14.6 * 4096 * 4
    assert on_disk[PROMPTS_PREFIX] + on_disk.get(EDITS_PREFIX, 0) == pytest.approx(total - 3 * GIB)


def test_automatic_budgets_are_shares_of_what_is_free():
    plan = plan_for()
    weights = sizes(plan)["weights"] + sizes(plan)["CUDA context"]
    assert plan.chosen.budgets["gpu"] == 0.25 * (80 * GIB - weights)
    host = peak([p for p in plan.chosen.parts if "prefix" not in p.name], "host")
    assert plan.chosen.budgets["host"] == 0.5 * (128 * GIB - host)
    assert plan.chosen.budgets["disk"] == 500 * GIB


def test_the_gpu_share_leaves_room_for_training():
    machine = replace(LARGE, gpu=60 * GIB)
    plan = plan_for("qwen2.5-72b", n=20_000, machine=machine, streamed=True, cut="mlp")
    gpu = [p for p in plan.chosen.parts if p.place == "gpu"]
    free = machine.gpu - peak([p for p in gpu if "prefix of" not in p.name], "gpu")
    share = 0.25 * (machine.gpu - sizes(plan)["weights"] - sizes(plan)["CUDA context"])
    assert 0 < free < share  # else this case shows nothing
    assert plan.chosen.budgets["gpu"] == free
    assert plan.peaks()["gpu"] == pytest.approx(machine.gpu)


def test_a_cut_that_needs_no_disk_comes_first():
    few = plan_for("qwen2.5-72b", n=3000)
    many = plan_for("qwen2.5-72b", n=100_000)
    assert few.chosen.setting.cut == "matrix"
    assert many.chosen.setting.cut == "mlp"
    matrix = next(c for c in many.candidates if c.setting.streamed and c.setting.cut == "matrix")
    assert matrix.reason is None
    assert matrix.edits["disk"] > 0
    # Where every cut needs the disk, the narrowest does least.
    no_memory = replace(LARGE, prefix_gpu=0, prefix_host=0)
    assert plan_for("qwen2.5-72b", n=3000, machine=no_memory).chosen.setting.cut == "mlp"


def test_edits_prefix_must_fit():
    machine = replace(LARGE, prefix_gpu=0, prefix_host=0, disk=GIB)
    plan = plan_for(machine=machine, n=100_000)
    assert plan.chosen is None
    assert {c.reason.split(";")[0].split(" takes")[0] for c in plan.candidates} == {"the prefix"}


def test_evaluation_runs_all_layers_where_its_prefix_does_not_fit():
    edits = 3000 * 14.6 * 4096 * 2
    machine = replace(LARGE, prefix_gpu=int(edits * 1.5), prefix_host=0, prefix_disk=0)
    keys = {"dtype": "bfloat16", "cut": "mlp"}
    plan = plan_for(machine=machine, streamed=False, **keys)
    assert PROMPTS_PREFIX not in sizes(plan)
    names = [phase.name for phase in plan.phases]
    assert PROMPTS_PREFIX not in names
    kept = plan_for(streamed=False, **keys)
    assert PROMPTS_PREFIX in sizes(kept)
    # Texts of 15 tokens fill the 16 columns of a fixed shape.
    prompts = plan.work.eval_tokens * 16 / 15
    below = prefix_flop(plan.shapes, plan.work, "layer") * prompts
    assert plan.phases[-1].flop == pytest.approx(kept.phases[-1].flop + 2 * below)
    # A streamed model has no layers to run instead.
    assert plan_for(machine=machine, streamed=True, **keys).chosen is None


def test_budgets_as_keys_are_rounded_down():
    plan = plan_for()
    for place, budget in plan.chosen.budgets.items():
        key = plan.keys()[f"prefix_{place}_gib"]
        assert key <= budget / GIB < key + 0.01


# What fits


def test_preference():
    plan = plan_for(dtype="float32")
    order = [(c.setting.dtype, c.setting.streamed, c.setting.cut) for c in plan.candidates]
    cuts = ("matrix", "mlp", "layer")
    assert order == [
        (dtype, streamed, cut)
        for dtype in ("float32", "bfloat16")
        for streamed in (False, True)
        for cut in cuts
    ]
    assert plan.chosen is plan.candidates[0]
    for dtype in ("float16", "bfloat16"):
        half = plan_for(dtype=dtype)
        assert {c.setting.dtype for c in half.candidates} == {dtype}


def test_micro_batch_is_halved_until_it_fits():
    machine = replace(LARGE, gpu=34 * GIB)
    plan = plan_for(machine=machine, streamed=False, dtype="float32")
    assert plan.chosen.setting.dtype == "float32"
    size = plan.chosen.setting.micro_batch_size
    assert size in (50, 25, 12, 6, 3)
    assert plan.peaks()["gpu"] <= 34 * GIB
    assert plan.keys()["micro_batch_size"] == size
    given = plan_for(machine=machine, streamed=False, micro_batch_size=4)
    assert given.chosen.setting.micro_batch_size == 4 or size < 4


def test_micro_batch_is_never_more_than_there_are_edits():
    assert plan_for(n=7).chosen.setting.micro_batch_size == 7


@pytest.mark.parametrize(("gpu", "fits"), [(300, "float32"), (100, "float32"), (14, "bfloat16")])
def test_precision_gives_way_last(gpu, fits):
    plan = plan_for("llama3-8b", machine=replace(LARGE, gpu=gpu * GIB), dtype="float32")
    assert plan.chosen.setting.dtype == fits


def test_every_candidate_says_why_it_does_not_fit():
    plan = plan_for(machine=replace(LARGE, gpu=4 * GIB))
    assert plan.chosen is None
    assert plan.keys() == {}
    assert plan.phases == ()
    for candidate in plan.candidates:
        needed = bytes_text(peak(candidate.parts, "gpu"))
        assert candidate.reason.startswith(f"the GPU needs {needed} of 4 GiB (weights ")
        assert candidate.setting.micro_batch_size == 1


def test_host_must_hold_the_model_on_its_way():
    keys = {"n": 100, "streamed": False, "dtype": "float32"}
    plan = plan_for(machine=replace(LARGE, host=8 * GIB), **keys)
    reason = plan.candidates[0].reason
    # Its bfloat16 checkpoint is mapped while it is converted.
    needed = 8_030_261_248 * (4 + 2) + 2 * GIB + 128256 * 950 + 100 * 4096
    assert reason.startswith(f"the host needs {bytes_text(needed)} of 8 GiB (weights on their way")
    parts = plan_for(n=100).chosen.parts
    assert not any("converted" in p.name for p in parts)


def test_layer_0_leaves_nothing_to_stream():
    plan = plan_for(layers=[0])
    assert not any(c.setting.streamed for c in plan.candidates)
    with pytest.raises(HyperParamsError, match="layer 0 is trained"):
        plan_for(layers=[0], streamed=True)


@pytest.mark.parametrize(
    ("cut", "message"),
    [("mlp", "`prefix_cut=mlp` is not possible here; choose among matrix, layer"),
     ("head", "`prefix_cut='head'` must be null or one of matrix, mlp, layer")],
)  # fmt: skip
def test_wrong_cut(cut, message):
    with pytest.raises(HyperParamsError, match=message):
        plan_for("gpt-j-6B", cut=cut)


def test_unknown_model():
    with pytest.raises(ModelError, match="its shapes are not shipped"):
        plan_for(model_name="some/other")


# Work


def test_step_of_llama_3_8b_by_hand():
    plan = plan_for()
    work = plan.work
    matrix, layer = 4096 * 14336, 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    late = 4096 * 4096 + 3 * matrix
    scored, attention = 4.3 / 14.6, 4 * 64 * 4096
    token = 4 * matrix  # forward, and the gradient of the trained matrix
    token += 9 * (4 * layer + 3 * attention) - (1 - scored) * 4 * late
    token += 4 * scored * 4096 * 128256
    assert step_flop(plan.chosen.run) == pytest.approx(100 * 14.6 * token)
    below = 22 * (2 * layer + attention) + 2 * (layer - matrix) + attention
    assert prefix_flop(plan.shapes, work, "matrix") == pytest.approx(below)
    assert prefix_flop(plan.shapes, work, "mlp") == pytest.approx(below - 2 * 2 * matrix)
    upper = 10 * (2 * layer + attention) - (1 - scored) * 2 * late
    upper += 2 * scored * 4096 * 128256
    assert evaluation_flop(plan.shapes, work) == pytest.approx(upper)


def test_matrices_trained_further_up_have_gradients_too():
    one, two = plan_for(), plan_for(layers=[22, 25])
    more = step_flop(two.chosen.run)
    more -= step_flop(one.chosen.run)
    assert more == pytest.approx(100 * 14.6 * 2 * 4096 * 14336)


def test_first_layer_may_be_the_last():
    plan = plan_for(layers=[31])
    matrix, scored = 4096 * 14336, 4.3 / 14.6
    token = scored * 4 * matrix + 4 * scored * 4096 * 128256
    flop = step_flop(plan.chosen.run)
    assert flop == pytest.approx(100 * 14.6 * token)


def test_whole_layer_trains_all_its_matrices():
    plan = plan_for("mistral-7b")
    [above] = set(plan.shapes.above_cut.values())
    layer = plan.shapes.layers[23]
    assert above == layer.matmul == layer.trained_matmul
    last = replace(plan.shapes, layers=plan.shapes.layers[:24])
    head = 4 * 4.3 / 14.6 * 4096 * 32000
    expected = 100 * 14.6 * (6 * above + 3 * 4 * 64 * 4096 + head)
    assert step_flop(replace(plan.chosen.run, shapes=last)) == pytest.approx(expected)


def test_bytes_and_time():
    plan = plan_for("qwen2.5-72b", n=100_000, work={"evaluate": False})
    loading, prefix, training = plan.phases
    stored = 2 * plan.shapes.upper
    assert loading.checkpoint == stored
    assert loading.seconds == pytest.approx(stored / 3e9)
    assert prefix.checkpoint == 2 * plan.shapes.streamed
    assert prefix.seconds == pytest.approx(prefix.flop / 400e12)
    assert training.flop == pytest.approx(25 * 1000 * step_flop(plan.chosen.run))
    adam = 34 * 29568 * 8192 / 2.8e12  # a step, when the backward pass is done
    assert training.seconds == pytest.approx(training.flop / 400e12 + 25 * 1000 * adam)
    assert training.disk == 0
    slow = replace(LARGE, rate=4e6, read=0.5)  # computing takes no time
    plan = plan_for("qwen2.5-72b", n=100_000, work={"evaluate": False}, machine=slow)
    assert plan.phases[1].seconds == pytest.approx(2 * plan.shapes.streamed / 0.5e9)


def test_disk_is_read_in_every_epoch():
    machine = replace(LARGE, prefix_gpu=0, prefix_host=0)
    plan = plan_for("qwen2.5-72b", n=3000, machine=machine, work={"epochs": 7})
    edits = 3000 * 14.6 * 8192 * 2
    _, prefix, training, prompts, evaluation = plan.phases
    assert training.disk == pytest.approx(7 * edits)
    # All tokens go through 55 layers: each reads and writes them.
    assert prefix.disk == pytest.approx(edits * (1 + 2 * 55))
    assert prompts.disk == pytest.approx(4 * edits * 2 * 55)
    assert evaluation.disk == pytest.approx(2 * 4 * edits)


def test_checkpoint_is_read_in_its_own_precision():
    plan = plan_for(dtype="float32")
    assert plan.phases[0].checkpoint == 2 * plan.shapes.parameters
    assert plan_for("gpt-j-6B", dtype="bfloat16").phases[0].checkpoint == 4 * 6_050_882_784


@pytest.mark.parametrize(
    ("gpu", "dtype", "rate", "expected"),
    [(80, "bfloat16", None, 400), (80, "float32", None, 40), (None, "float32", None, 0.15),
     (None, "bfloat16", None, 0.6), (80, "float32", 7.0, 7), (80, "float16", None, 400)],
)  # fmt: skip
def test_rates(gpu, dtype, rate, expected):
    machine = replace(LARGE, gpu=gpu, rate=rate)
    assert machine.flops(dtype) == pytest.approx(expected * 1e12)


def test_assumptions_are_stated():
    assert assumptions(plan_for())[0].startswith("400 TFLOP/s are reached in bfloat16 (assumed")
    text = "\n".join(assumptions(plan_for(dtype="float32")))
    assert "40 TFLOP/s are reached in float32 (assumed" in text
    assert "3 GB/s (assumed" in text
    assert "15.6 tokens, 4.3 of them targets" in text
    assert "Evaluation is teacher-forced" in text
    given = assumptions(plan_for(machine=replace(LARGE, rate=11.0), work={"evaluate": False}))
    assert given[0] == "11 TFLOP/s are reached in bfloat16 (as given)."
    assert not any("Evaluation" in line for line in given)


def test_plan_as_plain_values(tmp_path):
    folder = tmp_path / "toy"
    toy_model("llama").config.save_pretrained(folder)
    hparams = toy_hparams(model_name=str(folder))
    plan = make_plan(hparams, Workload.from_hparams(hparams, 10), LARGE)
    found = plan.to_dict()
    assert found["model"]["layers"] == 4
    assert found["settings"] == plan.keys()
    assert found["chosen"]["fits"] is True
    assert found["seconds"] == pytest.approx(sum(p.seconds for p in plan.phases))
    assert found["peak_bytes"] == plan.peaks()
    assert len(found["memory"]) == len(plan.chosen.parts)


# Values


@pytest.mark.parametrize(
    ("text", "n"),
    [("80GiB", 80 * GIB), ("80GB", 80 * 10**9), ("80G", 80 * GIB), ("80", 80 * GIB),
     ("1.5", int(1.5 * GIB)), (" 512 MiB ", 2**29), ("2tb", 2 * 10**12), (".5g", GIB // 2),
     ("1k", 1024)],
)  # fmt: skip
def test_sizes(text, n):
    assert parse_size("gpu", text) == n


@pytest.mark.parametrize("text", ["8x", "", "GiB", "-5", "1e3GB", "80 GiB GiB", "nan", "8,5GB"])
def test_no_sizes(text):
    with pytest.raises(HyperParamsError, match=f"`gpu={text}` is no size. Write gpu=80GiB"):
        parse_size("gpu", text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0"])
def test_a_size_is_above_0(text):
    with pytest.raises(HyperParamsError, match=f"`host={text}` must be above 0"):
        parse_size("host", text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "`n=0` must be 1 or more"),
        ({"n": 5, "epochs": 0}, "`epochs=0` must be 1 or more"),
        ({"n": 5, "targets": 0}, "`targets=0` must be above 0"),
        ({"n": 5, "tokens": 5.0}, "`tokens=5.0` must be at least one more than `targets=4.3`"),
        ({"n": 5, "tokens": float("nan")}, "`tokens=nan` must be at least"),
    ],
)
def test_wrong_work(values, message):
    with pytest.raises(HyperParamsError, match=message):
        Workload(**values)


@pytest.mark.parametrize("key", ["rate", "read"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_rates(key, value):
    with pytest.raises(HyperParamsError, match=f"`{key}={value}` must be above 0"):
        replace(LARGE, **{key: value})


def test_figures_read_well():
    assert [bytes_text(n * GIB) for n in (0, 0.5, 12.345, 135.4, 4345)] == [
        "-", "0.5 GiB", "12.3 GiB", "135 GiB", "4,345 GiB"
    ]  # fmt: skip
    assert [flop_text(n) for n in (5, 2.5e9, 1e12, 3.18e18)] == [
        "5 FLOP", "2.5 GFLOP", "1 TFLOP", "3.18 EFLOP"
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.04, 119, 600, 7200, 3e5)] == [
        "0.04 s", "119 s", "10.0 min", "2.0 h", "3.5 d"
    ]  # fmt: skip
