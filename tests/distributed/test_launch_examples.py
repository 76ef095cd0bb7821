"""The examples of launching: accelerate and torchrun read them, and Slurm's tools are called so."""

import os
import stat
import subprocess

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.toys import REPOSITORY
from torch.distributed.run import get_args_parser

from locft_easyedit.plan.plan import launch_command
from locft_easyedit.plan.setting import Setting

FOLDER = REPOSITORY / "examples" / "launch"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = sorted([*FOLDER.glob("*.sbatch"), *FOLDER.glob("*.sh")])
COMMAND = ["edit", "--config-name", "llama3-8b", "data=x.json", "output=out of here"]


def accelerated(*arguments, monkeypatch):
    """Returns what accelerate makes of a command line, and what it would hand to torchrun."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    given = launch_command_parser().parse_args([*arguments, "-m", "locft_easyedit", *COMMAND])
    args, _, _ = _validate_launch_command(given)
    prepare_multi_gpu_env(args)
    return args


def test_there_are_examples():
    assert [path.name for path in CONFIGS] == [
        "accelerate_one_node.yaml", "accelerate_several_nodes.yaml"
    ]  # fmt: skip
    assert [path.name for path in SCRIPTS] == [
        "slurm_one_node.sbatch", "slurm_several_nodes.sbatch", "torchrun.sh"
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path, monkeypatch):
    config = load_config_from_file(str(path))  # which refuses keys that it does not know
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "no"
    assert not config.fsdp_config
    args = accelerated("--config_file", str(path), monkeypatch=monkeypatch)
    assert args.multi_gpu
    assert (args.num_processes, args.num_machines) == (config.num_processes, config.num_machines)
    assert int(args.nproc_per_node) == 8
    assert args.training_script == "locft_easyedit"
    assert args.training_script_args == COMMAND
    assert args.module


def test_machines_agree_on_their_ranks(monkeypatch):
    path = FOLDER / "accelerate_several_nodes.yaml"
    args = accelerated(
        "--config_file", str(path), "--rdzv_backend", "c10d", "--main_process_ip", "a-node",
        "--max_restarts", "3", monkeypatch=monkeypatch,
    )  # fmt: skip
    assert args.rdzv_endpoint == "a-node:29500"
    assert args.rdzv_backend == "c10d"
    assert args.nnodes == "2"
    assert int(args.max_restarts) == 3


@pytest.mark.parametrize(
    ("gpus", "nodes", "layout", "group", "processes"),
    [(8, 1, "copies", 1, 8), (8, 2, "fsdp", 8, 16), (8, 1, "model_parallel", 2, 4)],
)
def test_accelerate_reads_the_command_of_a_plan(gpus, nodes, layout, group, processes, monkeypatch):
    setting = Setting("bfloat16", True, "matrix", 1, layout, group)
    command = launch_command(setting, gpus, nodes)
    assert command[:2] == ["accelerate", "launch"]
    assert command[-1] == "-m"
    filled = [{"RANK": "1", "HOST": "a-node"}.get(word, word) for word in command[2:-1]]
    args = accelerated(*filled, monkeypatch=monkeypatch)
    assert int(args.nproc_per_node) == processes // nodes
    assert args.num_machines == nodes
    if nodes > 1:
        assert (args.node_rank, args.rdzv_endpoint) == (1, "a-node:29500")


def called(script, tmp_path, **environment):
    """Runs a script with stand-ins for Slurm's tools and torchrun; returns what it has called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "log"
    stand_ins = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
        "torchrun": f'printf "%s\\n" "$@" > {log}\nexit "${{STATUS:-0}}"\n',
        "scontrol": "echo node-7\necho node-8\n",
    }
    for name, code in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{code}")
        (tools / name).chmod(stat.S_IRWXU)
    ran = subprocess.run(
        ["bash", str(script), *COMMAND],
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )
    return ran, get_args_parser().parse_args(log.read_text().splitlines())


SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_JOB_NODELIST": "node-[7-8]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_torchrun_reads_what_the_scripts_give_it(script, tmp_path):
    ran, args = called(script, tmp_path, GPUS="4", **SLURM)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert args.module
    assert args.training_script == "locft_easyedit"
    assert args.training_script_args == COMMAND  # also words with spaces in them
    assert args.nproc_per_node == "4"
    if script.stem == "slurm_several_nodes":
        assert (args.nnodes, args.rdzv_backend) == ("2", "c10d")
        assert (args.rdzv_endpoint, args.rdzv_id) == ("node-7:29623", "70123.0")
    else:
        assert args.standalone
    assert args.max_restarts == (3 if script.suffix == ".sbatch" else 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_failure_is_the_scripts(script, tmp_path):
    ran, _ = called(script, tmp_path, STATUS="3", **SLURM)
    assert ran.returncode == 3


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_warns_the_processes_in_time(script):
    text = script.read_text()
    options = dict(
        line.split()[1].removeprefix("--").split("=", 1)
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    name, _, seconds = options["signal"].partition("@")
    assert name == "TERM"  # not B:TERM, which would reach this script alone
    [patience] = [
        int(line.split("=")[1].split()[0])
        for line in text.splitlines()
        if line.startswith("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    ]
    assert 30 < patience < int(seconds)
    assert options["ntasks-per-node"] == "1"
    # Slurm reads its lines up to the first command.
    lines = [line for line in text.splitlines() if line.strip()]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_configs_say_what_to_change():
    for path in CONFIGS:
        assert yaml.safe_load(path.read_text())["gpu_ids" if "one" in path.stem else "num_machines"]
        assert "hange" in path.read_text()
