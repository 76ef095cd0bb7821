"""Frozen layers shared out among processes, against the same edit by one process."""

import json

import pytest
import torch
from helpers import sharded_ranks
from helpers.launching import launch
from helpers.toys import toy_model, toy_tokenizer
from safetensors.torch import load_file

pytestmark = pytest.mark.processes

# Gradients are added up in another order: by rank. That moved the losses of these runs (up to 7) by
# 1e-6, and the matrices by 1e-6, or 2e-5 where Adam divides by gradients that are next to nothing;
# a step changes them by 1e-2.
LOSS, MATRIX = 1e-5, 1e-4
# bfloat16 has 8 bits.
LOW_LOSS, LOW_MATRIX = 5e-2, 5e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a toy, saved in many parts."""
    root = tmp_path_factory.mktemp("models")

    def make(kind="llama", **config):
        where = root / kind
        if not where.exists():
            toy_model(kind, **config).save_pretrained(where, max_shard_size="50KB")
            toy_tokenizer().save_pretrained(where)
        return str(where)

    return make


def compared(n_ranks, wanted, tmp_path, **options):
    """Returns what one process gave for each run, and what each rank gave, through JSON."""
    alone = [{**run, "changes": run["changes"] | {"shard_frozen": None}} for run in wanted]
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    expected = json.loads(json.dumps(sharded_ranks.runs(str(one), *alone)))
    ranks = launch(
        n_ranks, "helpers.sharded_ranks:runs", str(several), *wanted, timeout=300, **options
    )
    return expected, [rank.value for rank in ranks]


def assert_same(name, expected, ranks, tmp_path, loss=LOSS, matrix=MATRIX):
    expected, found = expected[name], [rank[name] for rank in ranks]
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=loss)
        assert rank["losses"] == found[0]["losses"]
    one, several = (load_file(tmp_path / which / name) for which in ("one", "several"))
    assert one.keys() == several.keys()
    for key, value in one.items():
        assert torch.allclose(several[key], value, rtol=0, atol=matrix)
    # What is told about the frozen weights does not depend on who holds them.
    assert all(rank["frozen"] == expected["frozen"] for rank in found)
    return expected, found


def run(name, folder, n=5, kind="llama", measure=False, fault=None, **changes):
    """Returns a run for `sharded_ranks.runs`."""
    return {
        "name": name,
        "kind": kind,
        "folder": folder,
        "n": n,
        "changes": {"shard_frozen": True, "num_steps": 2} | changes,
        "measure": measure,
        "fault": fault,
    }


def test_edits_and_metrics_are_those_of_one_process(folder, tmp_path):
    wanted = [
        run("streamed", folder(), n=7, measure=True, layers=[1], stream_frozen=True),
        # More ranks than edits: one of them has nothing to train, and goes along.
        run("few", folder(), n=2, layers=[0, 2], micro_batch_size=1),
        run("lora", folder(), layers=[1], tuning="lora", lora_rank=2, frozen_prefix=False),
        run("low", folder(), layers=[1], dtype="bfloat16"),
        run("last", folder(), layers=[3]),
        run("repaired", folder(), layers=[1], repairs=1),
        run("whole layers", folder(), layers=[1, 3], rewrite_module_tmp="model.layers.{}."),
    ]
    expected, ranks = compared(3, wanted, tmp_path)
    layers = {
        "streamed": 2,
        "few": 3,
        "lora": 2,
        "low": 2,
        "last": 0,
        "repaired": 2,
        "whole layers": 1,
    }
    for name, n_layers in layers.items():
        low = {"loss": LOW_LOSS, "matrix": LOW_MATRIX} if name == "low" else {}
        one, several = assert_same(name, expected, ranks, tmp_path, **low)
        for rank in several:
            assert rank["sharded"] == n_layers
            assert rank["streamed"] == (name == "streamed")
            assert rank["metrics"] == one["metrics"]
            if name != "low":
                assert rank["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
        for parameter, numel in one["numel"].items():
            held = [rank["numel"][parameter] for rank in several]
            assert sum(held) == numel or held == [numel] * 3
    # Shares of edits, and of answers of unequal length, are not equal.
    assert any(rank["streamed"]["taken_part"] for rank in ranks)
    assert ranks[2]["few"]["taken_part"] > 0
    numel, shares = expected["few"]["numel"], ranks[0]["few"]["numel"]
    split = {name for name in numel if shares[name] < numel[name]}
    above = {name for name in numel if ".layers." in name and ".layers.0." not in name}
    assert split == above - {"model.layers.2.mlp.down_proj.weight"}


# Layers that return tuples, buffers of their own, one attention mask a type, weights that are saved
# in another form.
def test_another_number_of_processes_goes_on(folder, tmp_path):
    changes = {"stream_frozen": True, "num_steps": 10, "batch_size": 2}
    plain = run("plain", folder(), **changes)
    kept = {"checkpoint_dir": str(tmp_path / "checkpoint"), "checkpoint_minutes": 60}
    wanted = run("kept", folder(), **changes, **kept)
    (tmp_path / "several").mkdir()
    for rank in launch(
        3, "helpers.sharded_ranks:interrupted", str(tmp_path / "several"), wanted, 4
    ):
        said, n_taken = rank.value
        assert "Interrupted in epoch" in said
        assert 4 <= n_taken < 30  # ranks ask each other every quarter of a second
    [one, two] = launch(2, "helpers.sharded_ranks:runs", str(tmp_path / "several"), wanted)
    assert one.value["kept"]["sharded"] > 0
    assert one.value["kept"]["losses"] == two.value["kept"]["losses"]
    (tmp_path / "one").mkdir()
    alone = plain | {"changes": plain["changes"] | {"shard_frozen": None}}
    expected = sharded_ranks.runs(str(tmp_path / "one"), alone)["plain"]
    assert one.value["kept"]["losses"] == pytest.approx(expected["losses"], abs=LOSS)
    [(name, value)] = load_file(tmp_path / "one" / "plain").items()
    found = load_file(tmp_path / "several" / "kept")[name]
    assert torch.allclose(found, value, rtol=0, atol=MATRIX)


def test_other_architectures(folder, tmp_path):
    kinds = ("gptj", "gpt2", "gemma3", "mixtral")
    wanted = [
        run(kind, folder(kind), kind=kind, layers=[1], stream_frozen=kind == "mixtral")
        for kind in kinds
    ]
    expected, ranks = compared(2, wanted, tmp_path)
    for kind in kinds:
        _, several = assert_same(kind, expected, ranks, tmp_path)
        assert [rank["sharded"] for rank in several] == [2, 2]


def test_a_pass_that_fails_is_made_up_for(folder, tmp_path):
    def fails(when, *, memory=True, times=1, **more):
        fault = {"rank": 1, "when": when, "memory": memory, "times": times}
        return plain(f"{when} {memory} {times}", fault=fault, **more)

    def plain(name, **more):
        return run(name, folder(), n=8, layers=[0], batch_size=8, **more)

    right = [
        plain("none", measure=True),
        fails("forward"),
        fails("backward"),
        fails("evaluation", measure=True),
        plain("after"),
    ]
    wrong = [
        fails("forward", times=9),  # the edits of a mini-batch cannot be halved as often
        fails("backward", memory=False),
        fails("evaluation", memory=False, measure=True),
    ]
    ranks = [
        rank.value
        for rank in launch(
            2,
            "helpers.sharded_ranks:runs",
            str(tmp_path),
            *right[:-1],
            *wrong,
            right[-1],
            timeout=200,
        )
    ]
    expected = ranks[0]["none"]
    for name in (r["name"] for r in right):
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(expected["losses"], abs=LOSS)
            assert rank[name]["metrics"] in (None, expected["metrics"])
    assert [r["name"] for r in right if ranks[1][r["name"]]["faults"]] == [
        "forward True 1",
        "backward True 1",
        "evaluation True 1",
    ]
    for one in wrong:  # and all go on with the next run
        kind = "OutOfMemoryError" if one["fault"]["memory"] else "RuntimeError"
        told = f"RankError: Rank 1 of 2 failed: {kind}: on purpose"
        assert ranks[0][one["name"]] == {"error": told}
        assert ranks[1][one["name"]] == {"error": f"{kind}: on purpose"}
