"""Several processes make the edit that one makes, fail together, and go on from one checkpoint."""

import json
import signal
import time

import pytest
import torch
from helpers import distributed_runs
from helpers.launching import launch
from helpers.toys import REPOSITORY, toy_requests
from safetensors.torch import load_file

from locft_easyedit.training.checkpoint_file import read_checkpoint

# Sums are taken in another order. Of a loss, relatively, and of a matrix, over the norm of what the
# edit changed.
LOSS, MATRIX = 1e-6, 1e-5
HALF_LOSS, HALF_MATRIX = 3e-3, 0.08

pytestmark = pytest.mark.processes

CASES = [
    {},  # 14 edits, mini-batches of 4 and one of 2
    {"batch_loss_threshold": 5.9},  # some mini-batches make no update
    {"kind": "gpt2", "packing": False},
    {"kind": "gemma3", "prefix_cut": "layer"},
    {"micro_batch_size": 1, "frozen_prefix": False},
    {"tuning": "lora", "lora_rank": 4},
    {"loss_average": "token", "lr_schedule": "cosine"},
    {"pipeline": "depth_first", "batch_loss_threshold": 5.9},
    {"forms": ["question_answer", "context"], "forms_per_epoch": 2},
    {
        "forms": ["context"],
        "preserve": [str(REPOSITORY / "tests" / "helpers" / "kept_prompts.json")],
    },
    {"kind": "mixtral", "rewrite_module_tmp": "model.layers.{}.mlp.experts.down_proj[3]"},
    {"repairs": 1},
    {"n": 2},  # fewer edits than some worlds have processes
    {"dtype": "bfloat16"},
]


def apart(value, other, original):
    """Returns how far two edited matrices are apart, over what the second one's edit changed."""
    one, two, start = value.double(), other.double(), original.double()
    return float((one - two).norm() / (two - start).norm())


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_edit_of_one_process(n, tmp_path):
    ranks = launch(n, "helpers.distributed_runs:edits", str(tmp_path), CASES, timeout=400)
    for number, case in enumerate(CASES):
        _, alone = distributed_runs.edited(**case)
        half = case.get("dtype") == "bfloat16"
        loss, most = (HALF_LOSS, HALF_MATRIX) if half else (LOSS, MATRIX)
        found = [rank.value[number] for rank in ranks]
        assert all(other == found[0] for other in found[1:]), case  # to the last bit
        losses, step_losses, n_updates, _ = found[0]
        assert losses == pytest.approx(alone.losses, rel=loss)
        assert step_losses == pytest.approx(alone.step_losses, rel=loss)
        assert n_updates == alone.n_updates
        matrices = torch.load(tmp_path / f"{number}.pt")
        assert matrices.keys() == alone.new.keys()
        for name, value in matrices.items():
            assert apart(value, alone.new[name], alone.original[name]) < most, case


def test_a_place_that_rank_0_chooses(tmp_path):
    case = {"layers": "auto", "rewrite_module_tmp": "auto", "lr": "auto", "health_check": False}
    ranks = launch(2, "helpers.distributed_runs:edits", str(tmp_path), [case])
    _, alone = distributed_runs.edited(**case)
    [[losses, *_]], [[others, *_]] = (rank.value for rank in ranks)
    assert losses == others == pytest.approx(alone.losses, rel=LOSS)
    assert torch.load(tmp_path / "0.pt").keys() == alone.new.keys()


def test_each_keeps_its_share_of_the_prefix_for_a_later_run(tmp_path):
    case = {"prefix_dir": str(tmp_path / "prefix"), "packing": False}
    first = launch(2, "helpers.distributed_runs:edits", str(tmp_path), [case])
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prefix/*/*.safetensors")}
    assert sorted(path.parent.name for path in files) == ["rank-0-of-2", "rank-1-of-2"]
    again = launch(2, "helpers.distributed_runs:edits", str(tmp_path), [case])
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert [rank.value for rank in again] == [rank.value for rank in first]
    _, alone = distributed_runs.edited(packing=False)
    assert first[0].value[0][0] == pytest.approx(alone.losses, rel=LOSS)


def test_what_goes_wrong_for_one_goes_wrong_for_all():
    cases = [
        [{}, {"n": 13}],
        [{}, {"lr": 1e-3}],
        [{}, {"prefix_host_gib": 0.0, "prefix_disk_gib": 0.0}],
        [{"lr": 1e39}, {}],
    ]
    ranks = launch(2, "helpers.distributed_runs:failures", cases)
    for rank in ranks:
        (edits, _), (lr, _), _, (diverged, _) = rank.value
        assert edits.startswith("RankError: Rank 1 of 2 is about to make another edit than rank 0")
        assert "the edits are others (13 edits; now 14)" in edits
        assert "`lr=0.001` there; now 0.005." in lr
        assert "NonFiniteLossError: The loss became" in diverged
        assert all(whole for _, whole in rank.value)
    assert ranks[0].value[2][0].startswith("RankError: Rank 1 of 2 failed: The frozen prefix of")
    assert ranks[1].value[2][0].startswith("MemoryBudgetError: The frozen prefix of")


def taken_divergences(entries):
    """Takes each record's divergence on locality prompts out of its metrics."""
    return [entry["post"]["wrapped"].pop("locality_kl") for entry in entries]


@pytest.mark.parametrize("n", [2, 3])
def test_the_metrics_of_one_process(n, tmp_path):
    records = toy_requests(8)
    for i, record in enumerate(records[:5]):
        record["rephrase_prompt"] = f"Tell me: {record['prompt']}"
        record["locality"] = {"near": {"prompt": [f"Town {i} is", "Snow is"], "ground_truth": "a"}}
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    alone = json.loads(json.dumps(distributed_runs.measured(str(path), 8)))
    expected = taken_divergences(alone)
    for rank in launch(n, "helpers.distributed_runs:measured", str(path), 8):
        # Batches of other prompts round otherwise.
        assert taken_divergences(rank.value) == pytest.approx(expected, rel=2e-3, abs=2e-6)
        assert json.dumps(rank.value) == json.dumps(alone)
    # Fewer records than processes.
    [alone] = json.loads(json.dumps(distributed_runs.measured(str(path), 1)))
    taken_divergences([alone])
    for rank in launch(n, "helpers.distributed_runs:measured", str(path), 1):
        taken_divergences(rank.value)
        assert json.dumps(rank.value) == json.dumps([alone])


def test_easyedits_editor(easyedit, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(toy_requests(5)))
    expected = json.loads(json.dumps(distributed_runs.editor(str(path), 5)))
    for rank in launch(2, "helpers.distributed_runs:editor", str(path), 5):
        together, alone, by_perplexity = rank.value
        assert json.dumps([together, alone]) == json.dumps(expected[:2])
        for entry, other in zip(by_perplexity, expected[2], strict=True):
            assert entry["post"]["rewrite_ppl"] == pytest.approx(
                other["post"]["rewrite_ppl"], rel=1e-4
            )


@pytest.mark.slow
def test_smollm2(smollm2, shared_data):
    data = str(shared_data / "zsre_1k.json")
    losses, metrics = json.loads(json.dumps(distributed_runs.smollm2(str(smollm2), data)))
    for rank in launch(2, "helpers.distributed_runs:smollm2", str(smollm2), data, timeout=600):
        assert rank.value[0] == pytest.approx(losses, rel=1e-5)  # measured: 5e-7, with three 3e-6
        assert json.dumps(rank.value[1]) == json.dumps(metrics)


def test_nobody_ends_before_the_checkpoint_is_written(tmp_path):
    folder = tmp_path / "run"
    first, _ = launch(2, "helpers.distributed_runs:interrupted_while_the_disk_is_slow", str(folder))
    assert "has what was trained" in first.value
    assert read_checkpoint(folder / "checkpoint.safetensors").progress.step_losses


@pytest.mark.slow
def test_a_launcher_restarts_what_goes_on_from_the_checkpoint(tmp_path):
    out = launch(
        2,
        "helpers.distributed_runs:dies_once",
        str(tmp_path),
        6,
        through="torchrun --max-restarts=1",
    )
    _, alone = distributed_runs.edited()
    for rank in out:
        n_taken, losses = rank.value
        assert n_taken == 12 - 5  # of three epochs of four mini-batches
        assert losses == pytest.approx(alone.losses, rel=LOSS)


LONGER = """
num_steps: {epochs}
epoch_loss_threshold: 0
batch_loss_threshold: 0
checkpoint_minutes: 0
"""
EDIT = ("-m", "locft_easyedit", "edit", "--config-name", "toy.yaml", "data=edits.json")


@pytest.fixture
def folder(toy_folder):
    """A folder with a model, edits and hparams, as the current one."""
    yaml = toy_folder / "toy.yaml"
    yaml.write_text(yaml.read_text().replace("num_steps: 3\n", "") + LONGER.format(epochs=30))
    return toy_folder


def matrices(folder):
    return load_file(folder / "edit.safetensors")


def when_training(folder, act):
    """Returns what `launch` calls: `act` on the processes once there is a new checkpoint."""
    path = folder / "checkpoint" / "checkpoint.safetensors"
    former = path.stat().st_mtime_ns if path.exists() else None

    def meanwhile(processes):
        while not path.exists() or path.stat().st_mtime_ns == former:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        act(processes)

    return meanwhile


def interrupted(n, output, act):
    """Runs the command with `n` processes and does something to them in training."""
    command = [*EDIT, f"output={output}"]
    return launch(n, command, check=False, meanwhile=when_training(output, act))


def test_a_killed_rank_ends_the_run_and_any_number_of_processes_goes_on(folder):
    out = folder / "out"
    ranks = interrupted(3, out, lambda processes: processes[2].kill())
    assert [rank.returncode for rank in ranks] == [1, 1, -signal.SIGKILL]
    for rank in ranks[:2]:
        assert "has lost the other ranks in" in rank.stderr
        assert "checkpoint.safetensors has the last checkpoint" in rank.stderr
        assert "Traceback" not in rank.stderr
    saved = read_checkpoint(out / "checkpoint" / "checkpoint.safetensors")
    assert 0 < len(saved.progress.step_losses) < 60

    launch(1, [*EDIT, f"output={folder / 'alone'}"])
    # Killed once more, by two processes now, and finished by one.
    ranks = interrupted(2, out, lambda processes: processes[0].kill())
    assert "Rank 1 of 2 has lost the other ranks in" in ranks[1].stderr
    done = launch(1, [*EDIT, f"output={out}"])
    log = (out / "locft_edit.log").read_text()
    assert "training goes on in epoch" in log
    assert "processes was 3 and is 2" in log
    assert "processes was 2 and is 1" in log
    assert "edit:" in done[0].stdout
    found, expected = matrices(out), matrices(folder / "alone")
    [name] = [name for name in found if not name.startswith("original.")]
    assert apart(found[name], expected[name], expected[f"original.{name}"]) < MATRIX


def test_the_same_number_of_processes_goes_on_to_the_bit(folder):
    whole, out = folder / "whole", folder / "out"
    launch(2, [*EDIT, f"output={whole}"])
    interrupted(2, out, lambda processes: processes[1].kill())
    launch(2, [*EDIT, f"output={out}"])
    expected = matrices(whole)
    assert all(torch.equal(value, expected[name]) for name, value in matrices(out).items())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_to_one_stops_all_after_a_checkpoint(folder, number, status):
    out = folder / "out"

    def act(processes):
        processes[1].send_signal(number)
        processes[1].send_signal(number)  # a launcher passes on what a terminal has sent

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
    try:
        ranks = interrupted(2, out, act)
    finally:
        signal.signal(signal.SIGINT, former)
    assert [rank.returncode for rank in ranks] == [status, status]
    assert "locft edit: Interrupted in epoch" in ranks[0].stderr
    assert "The same command goes on." in ranks[0].stderr
    assert ranks[1].stderr.strip() == ""
    assert not (out / "metrics.json").exists()


def test_one_process_speaks_for_all(folder):
    ranks = launch(2, [*EDIT, "num_steps=1"])
    assert "reliability" in ranks[0].stdout
    assert (ranks[1].stdout, ranks[1].stderr) == ("", "")
    [run] = folder.glob("outputs/*/*/metrics.json")  # one folder, though both may have made one
    assert (run.parent / "locft_edit.log").exists()

    wrong = launch(2, [*EDIT, "layers=[40]"], check=False)
    assert [rank.returncode for rank in wrong] == [2, 2]
    assert wrong[0].stderr.count("`layers=[40]` is out of range") == 1
    assert wrong[1].stderr == ""


def test_evaluate(folder):
    arguments = ["-m", "locft_easyedit", "evaluate", "toy", "data=edits.json", "device=cpu"]
    metrics = "metrics=[accuracy,generated,ppl,fluency]"
    alone = launch(1, [*arguments, metrics, "output=alone"])
    both = launch(2, [*arguments, metrics, "output=both"])
    one, other = (json.loads((folder / f / "metrics.json").read_text()) for f in ("alone", "both"))
    for record, twin in zip(one["records"], other["records"], strict=True):
        for key in ("rewrite_ppl", "rephrase_ppl"):  # not rounded to tokens, as all others are
            assert twin["post"].pop(key) == pytest.approx(record["post"].pop(key), rel=1e-5)
        assert record == twin
    assert both[1].stdout == ""
    assert "reliability" in alone[0].stdout
    assert "reliability" in both[0].stdout


@pytest.mark.slow  # the command starts processes of its own
def test_locate_works_with_a_process_for_each_that_was_launched(folder):
    arguments = ["sweep_layers=[1,2]", "sweep_modules=[down]", "sweep_lrs=[0.01]", "output=study"]
    arguments += ["--config-name", "toy.yaml", "data=edits.json", "num_steps=1"]
    ranks = launch(2, ["-m", "locft_easyedit", "locate", *arguments], timeout=300)
    assert "score" in ranks[0].stdout
    assert (ranks[1].stdout, ranks[1].stderr) == ("", "")
    logs = sorted(path.name for path in (folder / "study" / "logs").iterdir())
    assert logs == ["cpu-0.txt", "cpu-1.txt"]
    assert len(json.loads((folder / "study" / "outcome.json").read_text())["cells"]) == 2


@pytest.mark.parametrize("command", ["plan", "delta"])
def test_commands_for_one_process_run_in_one(folder, command):
    ranks = launch(2, ["-m", "locft_easyedit", command, "--help"])
    assert f"locft {command}" in ranks[0].stdout
    assert ranks[1].stdout == ""
