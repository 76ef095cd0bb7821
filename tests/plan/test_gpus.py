"""Plans for several GPUs: who gets how much of a mini-batch, what a step waits for, what fits."""

import itertools
import math
from dataclasses import replace

import pytest
from test_candidates import LARGE, plan_for, sizes

from locft_easyedit.errors import HyperParamsError
from locft_easyedit.plan.cost import (
    EDITS_PREFIX,
    PROMPTS_PREFIX,
    adam_bytes,
    ring_seconds,
    step_flop,
    weight_bytes,
)
from locft_easyedit.plan.plan_tables import assumptions
from locft_easyedit.plan.setting import largest_share
from locft_easyedit.plan.units import GIB
from locft_easyedit.plan.workload import Machine

NODE = replace(LARGE, gpus=8, host=1024 * GIB, disk=4096 * GIB)
SMALL = replace(NODE, gpu=40 * GIB)  # where 25 layers of a 72B model do not fit one GPU
TRAINED = 4096 * 14336


# Shares


def distribution(n_edits, batch, n_ranks):
    """Returns the probability of each largest number, from every mini-batch that there is."""
    owned = [sum(1 for i in range(n_edits) if i % n_ranks == r) for r in range(n_ranks)]
    found = {}
    for counts in itertools.product(*(range(min(k, batch) + 1) for k in owned)):
        if sum(counts) == batch:
            ways = math.prod(math.comb(k, c) for k, c in zip(owned, counts, strict=True))
            found[max(counts)] = found.get(max(counts), 0) + ways
    return {m: ways / math.comb(n_edits, batch) for m, ways in found.items()}


@pytest.mark.parametrize(
    ("n_edits", "batch", "n_ranks"),
    [(10, 7, 3), (12, 4, 2), (30, 9, 4), (9, 8, 2), (7, 3, 5), (40, 6, 3), (11, 10, 4), (4, 2, 8)],
)
def test_largest_share_by_counting(n_edits, batch, n_ranks):
    exact = distribution(n_edits, batch, n_ranks)
    found = largest_share(n_edits, batch, n_ranks)
    assert found.mean == pytest.approx(sum(m * p for m, p in exact.items()), abs=1e-9)
    above = {m: sum(p for k, p in exact.items() if k >= m) for m in exact}
    assert found.most == max(m for m, p in above.items() if p >= 0.5 - 1e-12)
    # In so many steps even what is rare is met.
    assert largest_share(n_edits, batch, n_ranks, 10**9).most == max(exact)


def test_of_many_edits_the_share_is_that_of_a_multinomial():
    # Two ranks: the larger part of 100 tosses of a coin.
    mean = sum(max(k, 100 - k) * math.comb(100, k) for k in range(101)) / 2**100
    assert largest_share(10**8, 100, 2).mean == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(("n_edits", "n_ranks", "most"), [(100, 8, 13), (96, 8, 12), (5, 8, 1)])
def test_where_every_edit_is_in_each_step_nothing_is_chance(n_edits, n_ranks, most):
    for batch in (n_edits, n_edits + 3):
        found = largest_share(n_edits, batch, n_ranks, 1000)
        assert (found.mean, found.most) == (most, most)


def test_larger_mini_batches_are_dealt_out_more_evenly():
    over = [largest_share(10**6, b, 64).mean / (b / 64) for b in (100, 1000, 10_000)]
    assert over == sorted(over, reverse=True)
    assert 3.2 < over[0] < 3.4
    assert 1.15 < over[2] < 1.2
    alone = largest_share(10**6, 100, 1)
    assert (alone.mean, alone.most) == (100, 100)


# A step


def test_step_of_one_gpu_by_hand():
    step = plan_for().step()
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * TRAINED + 2 * 4096
    chunks = math.ceil(430 * 128256 / 2**26)
    moved = 2 * (TRAINED + 2 * 9 * layer + 2 * chunks * 4096 * 128256) + 8 * TRAINED
    assert step.weight_bytes == moved
    assert step.adam_bytes == (28 + 4 + 2) * TRAINED
    assert step.seconds == pytest.approx(
        {
            "compute": step.flop / 400e12,
            "weights": moved / 2.8e12,
            "launches": 10 * 0.7e-3,
            "all-gather": 0,
            "gradient exchange": 0,
            "Adam": 34 * TRAINED / 2.8e12,
        }
    )
    assert step.bound == "compute"
    assert step.total == pytest.approx(step.seconds["compute"] + step.seconds["Adam"])
    assert (step.ranks, step.share) == (1, 100)


def test_step_of_several_gpus_by_hand():
    plan = plan_for(n=100_000, machine=NODE)
    step, alone = plan.step(), plan_for(n=100_000).step()
    share = largest_share(100_000, 100, 8).mean
    assert step.share == share
    assert 17 < share < 18.5
    assert step.flop == pytest.approx(alone.flop * share / 100)
    assert step.seconds["compute"] == pytest.approx(alone.seconds["compute"] * share / 100)
    # However few its tokens, a rank reads every weight.
    assert step.seconds["weights"] == alone.seconds["weights"]
    assert step.seconds["launches"] == alone.seconds["launches"]
    assert step.seconds["Adam"] == alone.seconds["Adam"]
    assert step.seconds["gradient exchange"] == pytest.approx(2 * 7 / 8 * 4 * TRAINED / 300e9)
    assert step.exchanged_bytes == pytest.approx(2 * 7 / 8 * 4 * TRAINED)
    assert step.bound == "launches"
    names = ("launches", "gradient exchange", "Adam")
    assert step.total == pytest.approx(sum(step.seconds[name] for name in names))


def test_the_slowest_link_counts():
    across = replace(NODE, nodes=2)
    for machine, link in (
        (across, 50e9), (replace(across, network=900.0), 300e9), (replace(NODE, nvlink=7.0), 7e9)
    ):  # fmt: skip
        step = plan_for(machine=machine).step()
        n = machine.gpus * machine.nodes
        expected = 2 * (n - 1) / n * 4 * TRAINED / link
        assert step.seconds["gradient exchange"] == pytest.approx(expected)
    assert ring_seconds(1e9, 4, 3.0) == pytest.approx(0.5)
    assert ring_seconds(1e9, 1, 3.0) == 0


def test_lora_exchanges_little():
    full, lora = (
        plan_for(machine=NODE, **keys).step() for keys in ({}, {"tuning": "lora", "lora_rank": 16})
    )
    m = 16 * (4096 + 14336)
    assert lora.exchanged_bytes == pytest.approx(full.exchanged_bytes * m / TRAINED)
    assert lora.adam_bytes == 28 * m


def test_float32_has_nothing_to_publish():
    plan = plan_for(dtype="float32")
    assert adam_bytes(plan.chosen.run) == 28 * TRAINED
    setting = replace(plan.chosen.setting, cut="layer")
    wider = weight_bytes(replace(plan.chosen.run, setting=setting))
    layer = plan.shapes.layers[22].matmul
    assert wider - plan.step().weight_bytes == 4 * (2 * layer - TRAINED)


def test_micro_batches_read_the_weights_again():
    once, often = (plan_for(micro_batch_size=n).step() for n in (100, 25))
    assert often.seconds["launches"] == 4 * once.seconds["launches"]
    assert often.weight_bytes > 3 * once.weight_bytes
    assert often.flop == once.flop


def test_a_cpu_has_its_own_rate_and_no_more():
    machine = Machine(gpu=None, host=64 * GIB, disk=10 * GIB)
    step = plan_for("smollm2-135m", n=100, machine=machine).step()
    assert step.total == step.seconds["compute"] == step.flop / 0.15e12


# Memory


NODE_OF_ONE = replace(NODE, gpus=1)


def test_each_gpu_holds_a_copy_and_its_part_of_the_prefix():
    plan, alone = plan_for(n=100_000, machine=NODE), plan_for(n=100_000, machine=NODE_OF_ONE)
    here, there = sizes(plan), sizes(alone)
    for name in ("weights", "Adam's moments", "float32 gradients", "original values"):
        assert here[name] == there[name]
    assert here["NCCL's buffers"] == GIB // 2
    assert "NCCL's buffers" not in there
    edits = 100_000 * 14.6 * (4096 + 14336) * 2
    assert here[EDITS_PREFIX] == pytest.approx(edits / 8)
    assert here[PROMPTS_PREFIX] == pytest.approx(4 * 100_000 * 14.6 * 4096 * 2 / 8)
    assert plan.chosen.edits == {"gpu": pytest.approx(edits / 8)}
    most = largest_share(100_000, 100, 8, 25_000).most
    assert plan.chosen.setting.micro_batch_size == most < 40
    assert here["activations"] < there["activations"]
    assert plan.chosen.run.ranks == 8


def test_a_host_holds_all_processes_of_its_node():
    eight, one = (sizes(plan_for(machine=m), "host") for m in (NODE, NODE_OF_ONE))
    for name in ("Python and libraries", "tokenizer", "requests and tokens"):
        assert eight[name] == 8 * one[name]
    # A mapped checkpoint is there once; one that is converted each process holds for itself.
    way = "weights on their way to the GPU"
    assert eight[way] == one[way] == 2 * 8_030_261_248
    eight, one = (sizes(plan_for(machine=m, dtype="float32"), "host") for m in (NODE, NODE_OF_ONE))
    assert eight[way] == 8 * one[way]
    mapped = "checkpoint, mapped while it is converted"
    assert eight[mapped] == one[mapped]
    eight, one = (
        sizes(plan_for("qwen2.5-72b", machine=m), "host") for m in (NODE, NODE_OF_ONE)
    )  # fmt: skip
    buffers = "buffers of streamed layers"
    assert eight[buffers] == 8 * one[buffers]


def test_budgets_of_host_and_disk_are_a_nodes():
    machine = replace(NODE, nodes=2, prefix_gpu=GIB, prefix_host=10 * GIB)
    plan = plan_for(n=100_000, machine=machine, cut="matrix")
    node = 100_000 * 14.6 * (4096 + 14336) * 2 / 2
    assert plan.chosen.budgets["gpu"] == GIB
    assert plan.chosen.edits["gpu"] == GIB
    assert plan.chosen.edits["host"] == 10 * GIB
    assert plan.chosen.edits["disk"] == pytest.approx(node - 18 * GIB)
    assert plan.phases[2].disk == pytest.approx(25 * (node - 18 * GIB))
    no_room = replace(machine, disk=GIB)
    found = plan_for(n=100_000, machine=no_room, cut="matrix").candidates
    [reason, *_] = [c.reason for c in found if c.setting.layout == "copies"]
    assert reason.startswith("the prefix of a node takes ")


# What does not fit one GPU


def test_copies_come_first():
    plan = plan_for("qwen2.5-72b", machine=NODE)
    assert {c.setting.layout for c in plan.candidates} == {"copies"}
    assert plan.chosen.setting.streamed


def spread(batch_size, **keys):
    return plan_for("qwen2.5-72b", n=100_000, machine=SMALL, batch_size=batch_size, **keys)


def seconds_of(plan, layout):
    """Returns the step of the first setting of a layout that fits."""
    first = next(c for c in plan.candidates if c.setting.layout == layout and c.reason is None)
    return replace(plan, chosen=first).step()


def test_small_mini_batches_want_whole_layers_and_large_ones_cut_ones():
    few, many = spread(100), spread(2000)
    assert few.chosen.setting.layout == "model_parallel"
    assert many.chosen.setting.layout == "fsdp"
    cut = seconds_of(few, "fsdp")
    assert cut.bound == "all-gather"
    assert seconds_of(few, "model_parallel").total < cut.total
    assert seconds_of(many, "fsdp").total < seconds_of(many, "model_parallel").total
    for plan in (few, many):  # copies are told too, with the reason
        reasons = [c.reason for c in plan.candidates if c.setting.layout == "copies"]
        assert all(reason.startswith("the GPU needs") for reason in reasons)
        assert plan.peaks()["gpu"] <= 40 * GIB * (1 + 1e-9)


def test_layers_cut_up_by_hand():
    plan = spread(2000)
    shapes, setting = plan.shapes, plan.chosen.setting
    layer = shapes.layers[60].parameters
    assert shapes.sharded == 24 * layer
    upper = 25 * layer + 8192 + 152064 * 8192
    assert sizes(plan)["weights"] == pytest.approx(2 * (upper - 24 * layer * 7 / 8))
    assert sizes(plan)["gathered layers"] == 3 * 2 * layer
    passes = math.ceil(largest_share(100_000, 2000, 8).mean / setting.micro_batch_size)
    step = plan.step()
    assert step.gathered_bytes == 2 * passes * 2 * 24 * layer * 7 / 8
    assert step.seconds["all-gather"] == pytest.approx(step.gathered_bytes / 300e9)
    training, evaluation = plan.phases[2], plan.phases[-1]
    assert training.sent == pytest.approx(25 * 50 * (step.gathered_bytes + step.exchanged_bytes))
    batches = math.ceil(400_000 / 8 / 64)
    assert evaluation.sent == 2 * batches * 2 * 24 * layer * 7 / 8


def test_layers_on_several_gpus_by_hand():
    plan = spread(100)
    shapes, setting = plan.shapes, plan.chosen.setting
    assert setting.group == 2
    assert plan.chosen.run.ranks == 4
    layer = shapes.layers[60].parameters
    assert plan.chosen.run.resident == shapes.upper / 2 + layer
    assert plan.keys()["model_parallel"] is True
    assert plan.launcher() == ["accelerate", "launch", "--num_processes", "4", "-m"]
    assert sizes(plan, "host")["Python and libraries"] == 4 * 2 * GIB
    step = plan.step()
    assert step.ranks == 4
    assert step.share == largest_share(100_000, 100, 4).mean


def test_groups_are_as_small_as_can_be():
    def group(gib):
        machine = replace(NODE, gpu=gib * GIB)
        plan = plan_for("qwen2.5-72b", machine=machine, streamed=False, model_parallel=True)
        return plan.chosen and plan.chosen.setting.group

    assert [group(gib) for gib in (160, 80, 45, 28, 14)] == [2, 2, 4, 8, None]
    plan = plan_for(machine=replace(NODE, gpus=6), model_parallel=True, layers=[3])
    assert plan.chosen.setting.group == 2
    assert {c.setting.layout for c in plan.candidates} == {"model_parallel"}


def test_what_is_below_the_place_is_not_cut_up():
    machine = replace(NODE, gpu=12 * GIB)
    layouts = {
        c.setting.layout for c in plan_for(machine=machine, streamed=False, layers=[22]).candidates
    }
    assert layouts == {"copies", "model_parallel"}
    lowest = plan_for(machine=machine, layers=[0])
    assert {(c.setting.layout, c.setting.streamed) for c in lowest.candidates} == {
        ("copies", False), ("fsdp", False), ("model_parallel", False)
    }  # fmt: skip


def test_model_parallel_needs_gpus():
    with pytest.raises(HyperParamsError, match="Say how many there are, gpus=8, or give"):
        plan_for(machine=NODE_OF_ONE, model_parallel=True)


# Work and time


def test_gpus_share_the_work_and_a_node_reads_once():
    one, eight, two = (
        plan_for("qwen2.5-72b", n=100_000, machine=replace(NODE, gpus=g, nodes=n))
        for g, n in ((1, 1), (8, 1), (8, 2))
    )
    for plan, n in ((eight, 8), (two, 16)):
        for here, alone in zip(plan.phases, one.phases, strict=True):
            assert here.flop == pytest.approx(alone.flop)
            assert here.checkpoint == alone.checkpoint
        for number in (3, 4):
            assert plan.phases[number].seconds == pytest.approx(one.phases[number].seconds / n)
        assert plan.phases[0].seconds == one.phases[0].seconds
    assert two.phases[1].seconds == pytest.approx(2 * one.shapes.streamed / 3e9)
    step = eight.step()
    assert eight.phases[2].seconds == pytest.approx(25 * 1000 * step.total)
    assert eight.phases[2].sent == pytest.approx(25 * 1000 * step.exchanged_bytes)
    assert one.phases[2].sent == 0


def test_a_node_streams_its_part_through_its_disk():
    machine = replace(NODE, nodes=2, prefix_gpu=0, prefix_host=0)
    plan = plan_for("qwen2.5-72b", n=3000, machine=machine, work={"epochs": 7})
    edits = 3000 * 14.6 * 8192 * 2 / 2
    assert plan.phases[1].disk == pytest.approx(edits * (1 + 2 * 55))
    assert plan.phases[2].disk == pytest.approx(7 * edits)


def test_fewer_edits_than_a_mini_batch():
    plan = plan_for(n=30, machine=NODE)
    assert plan.step().share == 4
    whole = step_flop(plan.chosen.run)
    assert plan.phases[2].flop == pytest.approx(25 * 0.3 * whole)
    assert plan.phases[2].seconds == pytest.approx(25 * plan.step().total)


def test_plan_of_several_nodes_as_plain_values():
    plan = plan_for(machine=replace(NODE, nodes=2))
    found = plan.to_dict()
    assert found["step"]["ranks"] == 16
    assert found["step"]["bound"] == plan.step().bound == "gradient exchange"
    assert found["step"]["total_seconds"] == plan.step().total
    assert found["machine"]["nodes"] == 2
    assert found["chosen"]["layout"] == "copies"
    assert found["launcher"].startswith("accelerate launch --num_processes 16 --num_machines 2 ")
    assert plan_for().to_dict()["launcher"] == ""
    nothing = plan_for(machine=replace(NODE, gpu=GIB))
    assert nothing.step() is None
    assert nothing.launcher() == []
    assert nothing.to_dict()["step"] is None


def test_assumptions_of_several_gpus_are_stated():
    text = "\n".join(assumptions(plan_for(machine=replace(NODE, nodes=2, network=25.0))))
    assert "8 GPUs a node, 2 nodes" in text
    assert "Rings between GPUs carry 300 GB/s (assumed unless nvlink= says it)" in text
    assert "the network of a node 25 GB/s each way" in text
    assert "in 0.7 ms (assumed unless launch= says it)" in text
    assert "Rings" not in "\n".join(assumptions(plan_for()))


@pytest.mark.parametrize("key", ["bandwidth", "nvlink", "network", "launch"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_rates(key, value):
    with pytest.raises(HyperParamsError, match=f"`{key}={value}` must be above 0"):
        replace(NODE, **{key: value})


def test_wrong_numbers():
    with pytest.raises(HyperParamsError, match="`gpus=0` must be 1 or more") as info:
        replace(NODE, gpus=0, nodes=-1)
    assert "`nodes=-1` must be 1 or more" in str(info.value)
    with pytest.raises(HyperParamsError, match=r"are 16 GPUs, and none has a memory\. Add gpu="):
        replace(NODE, gpu=None, nodes=2)
