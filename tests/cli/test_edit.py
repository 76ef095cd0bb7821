"""The command line, as a user runs it, on a toy model in a folder."""

import json
import shlex

import pytest
import torch
from helpers.rank_pool import run_python
from helpers.toys import TOY_YAML, toy_model, toy_requests, toy_tokenizer
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.api import edit_model
from locft_easyedit.cli.edit import repairs_line
from locft_easyedit.delta.delta import Delta
from locft_easyedit.hparams import LocFTBFHyperParams

pytestmark = pytest.mark.processes


def run(*arguments):
    """Runs `locft edit` in a process of its own: Hydra keeps state in this one."""
    return run_python(["-m", "locft_easyedit", "edit", *arguments])


def test_edit_writes_what_there_is_to_see(toy_folder):
    done = run("--config-name", "toy.yaml", "data=edits.json", "n=5", "lr=2e-2", "output=out")
    assert done.returncode == 0, done.stderr
    assert "reliability (generated)" in done.stdout
    assert "perplexity of a fixed text" in done.stdout
    assert "breadth-first" not in done.stderr  # a progress bar is for a terminal
    out = toy_folder / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["records"]) == metrics["training"]["trained_edits"] == 5
    assert metrics["training"]["health"]["perplexity_after"] > 1
    assert set(metrics["summary"]["post"]) == {
        "rewrite_acc", "rephrase_acc", "locality", "portability", "generated", "wrapped"
    }  # fmt: skip
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((out / "hparams.json").read_text())
    assert kept["lr"] == 0.02
    assert kept["seed"] == 42

    model = toy_model("llama")
    values = {key: value for key, value in kept.items() if value is not None}
    edit_model(
        model,
        toy_tokenizer(),
        toy_requests(5),
        LocFTBFHyperParams.from_mapping(values, source="hparams.json"),
        progress=False,
    )
    delta = Delta.load(out / "edit.safetensors")
    [(name, tensor)] = delta.new.items()
    assert torch.equal(dict(model.named_parameters())[name], tensor)
    assert delta.metadata["requests"]["count"] == 5
    assert delta.metadata["metrics"]["post"].keys() == metrics["summary"]["post"].keys()
    assert delta.verify(model).state == "applied"


@pytest.mark.parametrize(
    ("wrong", "rounds", "lost", "line"),
    [
        (0, 0, 0, "1,200 texts did not hold."),
        (7, 1, 0, "1,200 texts did not hold, and after 1 round of repair all did."),
        (7, 4, 2, "1,200 texts did not hold, and after 4 rounds of repair 2 edits were left."),
    ],
)
def test_what_is_said_of_repairs(wrong, rounds, lost, line):
    repairs = {"checked_texts": 1200, "wrong_texts": wrong, "rounds": rounds, "lost_edits": lost}
    assert repairs_line(repairs) == f"Check after the epochs: {wrong} of {line}\n"
    assert repairs_line(None) == ""


def test_a_run_with_repairs_says_so_twice(toy_folder):
    arguments = ["--config-name", "toy.yaml", "data=edits.json", "n=3", "repairs=1", "output=out"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Check after the epochs: 3 of 3 texts did not hold, and after 1 round" in done.stdout
    assert "3 of 3 edits do not hold" in done.stdout
    again = run(*arguments)
    assert "Check after the epochs: 3 of 3 texts did not hold, and after 1 round" in again.stdout


def test_edit_saves_the_whole_model_where_asked(toy_folder):
    # Overrides may come before the name.
    done = run("data=edits.json", "--config-name", "toy.yaml", "save=model", "output=out")
    assert done.returncode == 0, done.stderr
    edited = AutoModelForCausalLM.from_pretrained(toy_folder / "out" / "model").state_dict()
    original = toy_model("llama").state_dict()
    assert [n for n in original if not torch.equal(original[n], edited[n])] == [
        "model.layers.2.mlp.down_proj.weight"
    ]
    assert not (toy_folder / "out" / "edit.safetensors").exists()


def test_a_multirun_makes_a_folder_a_cell(toy_folder):
    done = run("--config-name=toy.yaml", "data=edits.json", "-m", "output=out", "lr=1e-2,2e-2")
    assert done.returncode == 0, done.stderr
    rates = [
        json.loads((toy_folder / "out" / cell / "hparams.json").read_text())["lr"] for cell in "01"
    ]
    assert rates == [0.01, 0.02]
    # The last table has both.
    last = done.stdout[done.stdout.index("All runs: means after the edit") :]
    assert "0: lr=0.01" in last
    assert "1: lr=0.02" in last
    assert "reliability (generated)" in last
    assert "output=" not in last


def test_help_and_shipped_names(capsys):
    assert main(["edit", "--help"]) == 0
    assert "llama3-8b" in capsys.readouterr().out
    assert main([]) == 0
    assert "locft demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name=toy.yaml", "data=none.json"], "`data=none.json` is not a file"),
        (["--config-name=toy.yaml"], "`data` is missing"),
        # Names and files that are good: what comes after them is told.
        (["--config-name=LocFT-BF+/smollm2-135m", "data=none.json"], "`data=none.json` is not a"),
        (["--config-name=LocFT-BF/smollm2-135m", "data=none.json"], "`data=none.json` is not a"),
        (["--config-name=null.yaml", "data=none.json"], "`data=none.json` is not a file"),
        (["--config-name=toy.yaml", "data=edits.json", "n=9"], "`n=9`, but edits.json holds 6"),
        (["--config-name=toy.yaml", "data=edits.json", "lr=-1"], "`lr=-1.0` must be above 0"),
        (["--config-name=toy.yaml", "data=edits.json", "save=all"], "`save='all'` must be one of"),
        (["--config-name=toy.yaml", "data=edits.json", "layers=[9]"], "4 layers (0 to 3)"),
        (["--config-name=toy.yaml", "data=edits.json", "model_name=./no"], "does not exist"),
        (["--config-name=nobody", "data=edits.json"], "--config-name=nobody is not known"),
        (["data=edits.json"], "--config-name is missing"),
        (["--config-name=smollm2-135", "data=edits.json"], "Did you mean smollm2-135m?"),
        (["--config-name=toy.yaml", "data=edits.json", "num_step=3"], "mean `num_steps`?"),
        (["--config-name=toy.yaml", "data=edits.json", "hydra.foo=3"], "Could not override"),
        (["--config-name=toy.yaml", "data=edits.json", "output=toy.yaml"], "toy.yaml: File exists"),
        (["--config-name=broken.yaml", "data=edits.json"], "`learning_rate` is not a key"),
        (["--config-name=toy.yaml", "data=bad.json"], "bad.json, line 2, column"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_message_and_exit_code_2(toy_folder, arguments, message):
    (toy_folder / "broken.yaml").write_text(TOY_YAML + "learning_rate: 1\n")
    (toy_folder / "null.yaml").write_text(TOY_YAML.replace("num_steps: 3", "num_steps: null"))
    (toy_folder / "bad.json").write_text("[\n{]")
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_paths_and_templates_are_taken_as_they_stand(toy_folder):
    odd = toy_folder / "a (b)=c, 50% 模型"
    odd.mkdir()
    (toy_folder / "edits.json").rename(odd / "edits.json")
    done = run(
        "--config-name=toy.yaml", f"data={odd.name}/edits.json", f"output={odd.name}/out",
        "rewrite_module_tmp=model.layers.{}.mlp.up_proj.weight", "layers=1", "metrics=generated",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    edit = Delta.load(odd / "out" / "edit.safetensors")
    assert list(edit.new) == ["model.layers.1.mlp.up_proj.weight"]
    # The last line can be pasted into a shell.
    asked = shlex.split(done.stdout.strip().split("\n")[-1].removeprefix("try it: "))
    assert asked == ["locft", "ask", "./toy", f"delta={odd}/out/edit.safetensors"]


def test_a_full_disk_at_the_start_is_one_message(toy_folder):
    code = """
import errno, pathlib, sys
from locft_easyedit.__main__ import main
make = pathlib.Path.mkdir
def full(path, *args, **kwargs):
    if path.name == ".hydra" or path.name == "out":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    make(path, *args, **kwargs)
pathlib.Path.mkdir = full
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["edit", "--config-name=toy.yaml", "data=edits.json", "output=out"]
    done = run_python(["-c", code, *arguments])
    assert done.returncode == 2
    assert "No space left on device. Choose a folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_of_the_wrong_type_is_refused(toy_folder):
    done = run("--config-name=toy.yaml", "data=edits.json", "lr=fast")
    assert done.returncode == 2
    assert "`lr=fast` must be a number or auto" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "`frob` is no command"),
        (["run"], "needs the path of a script"),
        (["run", "no_script.py"], "`no_script.py` is not a file"),
    ],
    ids=str,
)
def test_other_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


SCRIPT = """
import argparse, json, sys
sys.path.append('..')
from easyeditor import BaseEditor, FTHyperParams
from sentence_transformers import SentenceTransformer

parser = argparse.ArgumentParser()
parser.add_argument('--hparams_dir')
hparams = FTHyperParams.from_hparams(parser.parse_args().hparams_dir)
editor = BaseEditor.from_hparams(hparams)
metrics, _, _ = editor.edit(
    prompts=['The river is', 'The bridge is'],
    target_new=['the Rhine', 'long'],
    locality_inputs={'near': {'prompt': ['He is', 'She is'], 'ground_truth': ['a', 'b']}},
    sequential_edit=True,
)
json.dump([type(editor).__name__, metrics], open('result.json', 'w'))
"""


def test_a_script_of_easyedit_runs_unmodified(toy_folder):
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    (toy_folder / "script.py").write_text(SCRIPT)
    done = run_python(["-m", "locft_easyedit", "run", "script.py", "--hparams_dir=toy.yaml"])
    assert done.returncode == 0, done.stderr
    name, metrics = json.loads((toy_folder / "result.json").read_text())
    assert name == "LocFTBFEditor"
    # Such scripts average all entries of locality; token lists are none of them.
    assert [set(m["post"]["locality"]) for m in metrics] == [{"near_acc"}] * 2
