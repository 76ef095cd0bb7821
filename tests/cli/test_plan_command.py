"""`locft plan`, as a user runs it."""

import json

import pytest

from locft_easyedit.__main__ import main

YAML = """
alg_name: LocFT-BF
model_name: ./toy
layers: [2]
rewrite_module_tmp: model.layers.{}.mlp.down_proj.weight
lr: 1e-2
micro_batch_size: null
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(capsys, *arguments, verbose=True):
    """Returns the exit status, stdout and stderr."""
    status = main(["plan", *arguments, *["verbose=true"] * verbose])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_tables_and_json(capsys, folder):
    status, out, err = run(
        capsys, "--config-name", "qwen2.5-72b", "n=100000", "gpu=80GiB", "stream_frozen=null",
        "output=new/plan.json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    for part in (
        "72,706,203,648 in 80 layers",
        "no: the GPU needs 141 GiB of 80 GiB (weights 135 GiB",
        "CHOSEN: prefix on the GPU",
        "activations",
        "most at one time",
        "prefix of the evaluation prompts",
        "a step",
        "400 TFLOP/s are reached in bfloat16 (assumed; rate= says what is reached).",
        "stream_frozen=true prefix_cut=mlp micro_batch_size=100",
    ):
        assert part in out
    found = json.loads((folder / "new" / "plan.json").read_text())
    assert found["settings"]["stream_frozen"] is True
    assert found["model"]["parameters"] == 72_706_203_648
    assert [c["fits"] for c in found["candidates"]] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("more", [[], ["gpus=8", "nodes=2"]], ids=["one", "several"])
def test_by_itself_it_fits_a_screen(capsys, monkeypatch, more):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["--config-name", "qwen2.5-72b", "n=100000", "gpu=80GiB", *more]
    status, out, err = run(capsys, *arguments, verbose=False)
    assert (status, err) == (0, "")
    lines = out.rstrip().split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100 + 60  # the line of keys may be pasted whole
    for part in ("most memory", "in all", "Settings that fit", "verbose=true", "stream_frozen="):
        assert part in out
    assert "Assumed" not in out


def test_arguments_override_the_yaml(capsys, folder):
    arguments = (
        "--config-name=llama3-8b", "n=10", "gpu=80", "host=64G", "disk=1TB", "rate=123", "read=5",
        "tokens=20", "targets=3", "epochs=2", "evaluate=false", "layers=[3]", "lr=1e-3",
        "dtype=bfloat16", "batch_size=5", "prefix_cut=layer", "stream_frozen=true",
        "prefix_gpu_gib=0.5", "prefix_host_gib=0", "prefix_disk_gib=1", "output=p.json",
    )  # fmt: skip
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    found = json.loads((folder / "p.json").read_text())
    assert found["work"] == {
        "n": 10, "tokens": 20, "targets": 3, "epochs": 2, "batch_size": 5,
        "micro_batch_size": None, "eval_batch_size": 64, "row_tokens": 64, "evaluate": False,
        "checked": False,
    }  # fmt: skip
    machine = found["machine"]
    assert (machine["gpu"], machine["host"], machine["disk"]) == (80 << 30, 64 << 30, 10**12)
    assert (machine["rate"], machine["read"], machine["flop_per_second"]) == (123, 5, 123e12)
    [chosen] = found["candidates"]
    assert (chosen["cut"], chosen["streamed"], chosen["dtype"]) == ("layer", True, "bfloat16")
    assert chosen["budget_bytes"] == {"gpu": 1 << 29, "host": 0, "disk": 1 << 30}
    assert found["model"]["first_layer"] == 3
    assert "prompts" in out
    assert "teacher-forced" not in out


def test_several_gpus(capsys, folder):
    arguments = (
        "--config-name=llama3-8b", "n=100000", "gpu=80GiB", "gpus=8", "nodes=2", "host=1TiB",
        "nvlink=250", "network=25", "bandwidth=3000", "launch=0.1", "output=p.json",
    )  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    told = " ".join(out.split())  # a caption is broken where its table ends
    for part in (
        "8 on each of 2 nodes; sizes are those of one GPU and of one node",
        "16 copies",
        "between GPUs",
        "NCCL's buffers",
        "gradient exchange <- bounds the step",
        "The largest of 16 ranks has 11.0 of 100 edits; even parts would be 6.2.",
        "To be started on each node with:",
        "accelerate launch --num_processes 16 --num_machines 2 --machine_rank RANK",
        "-m locft_easyedit edit ...",
    ):
        assert part in told
    machine = json.loads((folder / "p.json").read_text())["machine"]
    given = {"gpus": 8, "nodes": 2, "nvlink": 250, "network": 25, "bandwidth": 3000, "launch": 0.1}
    assert {key: machine[key] for key in given} == given
    status, out, _ = run(capsys, *arguments[:3], "host=1TiB")
    assert status == 0
    for part in ("accelerate", "copies", "between GPUs", "ranks", "NCCL"):
        assert part not in out


def test_layers_of_one_model_on_several_gpus(capsys):
    status, out, _ = run(
        capsys, "--config-name=qwen2.5-72b", "n=1000", "gpu=40", "gpus=8", "host=1TiB"
    )
    assert status == 0
    assert "4 x 2 (model_parallel)" in out
    assert "8, layers cut in 8 (FSDP2)" in out
    assert "model_parallel=true" in out
    assert "accelerate launch --num_processes 4 -m" in out


def test_a_cpu_needs_no_gpu(capsys):
    status, out, _ = run(capsys, "--config-name", "smollm2-135m", "n=100")
    assert status == 0
    assert "0.15 TFLOP/s are reached in float32" in out
    assert "CUDA" not in out


def test_yaml_of_ones_own(capsys, folder):
    from helpers.toys import toy_model

    (folder / "own").mkdir()
    (folder / "own" / "mine.yaml").write_text(YAML)
    toy_model("llama").config.save_pretrained(folder / "toy")
    for way in (["--config-name", "own/mine.yaml"], ["--config-dir=own", "--config-name=mine"]):
        status, out, _ = run(capsys, *way, "n=10", "gpu=1")
        assert status == 0
        assert "toy/config.json" in out


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "locft plan --config-name NAME n=N gpu=SIZE" in out
    assert "smollm2-135m" in out
    assert main([]) == 0
    assert "locft plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n=0", "gpu=80"], "`n=0` must be 1 or more"),
        (["gpu=80"], "`n` is missing. Add n=VALUE."),
        (["n=5"], "`gpu` is missing. Add gpu=80GiB, the memory of the GPU, or device=cpu"),
        (["n=5", "gpu=0"], "`gpu=0` must be above 0"),
        (["n=5", "gpu=eighty"], "`gpu=eighty` is no size. Write gpu=80GiB"),
        (["n=5", "gpu=8", "host=-1"], "`host=-1` is no size"),
        (["n=5", "gpu=8", "batchsize=3"], "`batchsize` is not a key. Did you mean `batch_size`?"),
        (["n=5", "gpu=8", "lr=-1"], "`lr=-1.0` must be above 0"),
        (["n=5", "gpu=8", "layers=[32]"], "Meta-Llama-3-8B-Instruct has 32 layers (0 to 31)"),
        (["n=5", "gpu=8", "rewrite_module_tmp=a.{}.b"], "matches nothing in layer 22"),
        (["n=5", "gpu=8", "model_name=who/knows"], "Put the model's config.json into that folder"),
        (["n=5", "gpu=8", "prefix_gpu_gib=-1"], "`prefix_gpu_gib=-1.0` must be 0 or more"),
        (["n=5", "gpu=8", "prefix_cut=head"], "`prefix_cut='head'` must be null or one of matrix,"),
        (["n=5", "gpu=8", "model_parallel=true"], "spreads the model over several GPUs"),
        (["n=5", "gpu=8", "gpus=0"], "`gpus=0` must be 1 or more"),
        (["n=5", "device=cpu", "gpus=2"], "are 2 GPUs, and none has a memory. Add gpu=80GiB"),
        (["n=5", "gpu=8", "nodes=2", "network=0"], "`network=0.0` must be above 0"),
    ],
)  # fmt: skip
def test_mistakes(capsys, arguments, message):
    status, out, err = run(capsys, "--config-name", "llama3-8b", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("locft plan: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alg_name: ROME", "`alg_name='ROME'` in mine.yaml is another method"),
        ("lern: 1", "`lern` is not a key of LocFT-BF"),
        ("num_steps: many", "`num_steps='many'`"),
    ],
)
def test_spoilt_yaml(capsys, folder, line, message):
    key = line.split(":")[0]
    kept = [one for one in YAML.splitlines() if not one.startswith(key + ":")]
    (folder / "mine.yaml").write_text("\n".join([*kept, line]))
    status, _, err = run(capsys, "--config-name", "mine.yaml", "n=5", "gpu=8")
    assert status == 2
    assert message in err


def test_no_config_name(capsys):
    status, _, err = run(capsys, "n=5", "gpu=8")
    assert status == 2
    assert "--config-name is missing. Choose one of: gemma-2-9b, " in err
    status, _, err = run(capsys, "--config-name", "none-such", "n=5")
    assert status == 2
    assert "--config-name=none-such is not known" in err


def test_nothing_fits(capsys, folder):
    status, out, err = run(
        capsys, "--config-name", "llama3-8b", "n=5", "gpu=2", "host=3", "dtype=float32",
        "output=plan.json",
    )  # fmt: skip
    assert status == 2
    assert "locft plan: No settings fit; each has its reason in the table." in err
    assert "bfloat16 with micro_batch_size=1: the GPU needs" in err
    assert out.count("no: the GPU needs") == 12
    assert "CHOSEN" not in out
    found = json.loads((folder / "plan.json").read_text())
    assert found["chosen"] is None
    assert found["settings"] == {}
    assert not any(c["fits"] for c in found["candidates"])


def test_output_that_cannot_be_written(capsys, folder):
    (folder / "file").write_text("")
    status, _, err = run(
        capsys, "--config-name", "gpt2-xl", "n=5", "gpu=80", "output=file/plan.json"
    )
    assert status == 2
    assert "cannot be made" in err
