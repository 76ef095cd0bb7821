"""The name under which LocFT-BF passes in EasyEdit's scripts, and what is said where it cannot."""

import argparse
import copy
import json
import pickle

import pytest

from locft_easyedit.easyedit.method_name import MethodName, refusal, script_method
from locft_easyedit.errors import HyperParamsError, LocFTError

SCRIPT = """
if args.editing_method == 'FT':
    editing_hparams = FTHyperParams
elif args.editing_method == 'ROME':
    editing_hparams = ROMEHyperParams
else:
    raise NotImplementedError
"""


@pytest.fixture
def yamls(tmp_path):
    (tmp_path / "ours.yaml").write_text("alg_name: locft_bf\n")
    (tmp_path / "ft.yaml").write_text("alg_name: FT\n")
    (tmp_path / "paper.yaml").write_text(
        "model_name_or_path: m\nlayer: 3\nrewrite_module: a.{}.b\nlr: 1e-4\n"
    )
    return tmp_path


def method_of(tmp_path, *arguments, source=SCRIPT):
    return script_method(tmp_path / "run_it.py", source, arguments)


def parsed(arguments, **options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--editing_method", required=True, type=str, **options)
    parser.add_argument("--hparams_dir")
    return parser.parse_args(arguments).editing_method


@pytest.mark.parametrize("name", ["LocFT-BF", "LocFT-BF+"])
def test_a_name_passes_for_another_and_reads_as_itself(name):
    method = MethodName(name, "FT")
    assert method == "FT"
    assert "FT" == method  # noqa: SIM300
    assert method == name
    assert method != "ROME"
    assert not method != "FT"  # noqa: SIM202
    assert method in ["ROME", "FT"]
    assert method not in ("ROME", "IKE")
    assert {"FT": 1}[method] == 1
    assert method in {"FT"}
    assert f"{method}_results.json" == f"{name}_results.json"
    assert "%s-%s" % (method, 1) == f"{name}-1"  # noqa: UP031
    assert json.loads(json.dumps({"method": method})) == {"method": name}
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert (other == "FT", f"{other}") == (True, name)


@pytest.mark.parametrize("spelling", ["LocFT-BF", "locft-bf", "LOCFT_BF"])
@pytest.mark.parametrize("joined", [True, False])
def test_the_scripts_parser_hands_it_on(yamls, spelling, joined):
    option = [f"--editing_method={spelling}"] if joined else ["--editing_method", spelling]
    method = method_of(yamls, *option, f"--hparams_dir={yamls / 'ours'}")
    assert method.alg_name == "LocFT-BF"
    for options in ({}, {"choices": ["ROME", "FT"]}):
        given = parsed(method.arguments, **options)
        assert given == "FT"
        assert f"{given}" == "LocFT-BF"


def test_a_yaml_of_ours_makes_any_methods_name_ours(yamls):
    for yaml in ("ours.yaml", "paper.yaml"):
        method = method_of(yamls, "--editing_method", "ROME", "--hparams_dir", str(yamls / yaml))
        assert method.alg_name == "LocFT-BF"
        assert parsed(method.arguments) == "ROME"
        assert f"{parsed(method.arguments)}" == "LocFT-BF"
    plus = method_of(yamls, "--editing_method=LocFT-BF+", f"--hparams_dir={yamls / 'ours.yaml'}")
    assert plus.alg_name == "LocFT-BF+"  # what the command line says is the user's


def test_other_methods_are_left_alone(yamls):
    given = ["--editing_method=FT", f"--hparams_dir={yamls / 'ft.yaml'}", "--x"]
    method = method_of(yamls, *given)
    assert method.arguments == given
    assert method.alg_name is None
    assert all(type(argument) is str for argument in method.arguments)
    knows_us = SCRIPT + "\nif args.editing_method == 'LocFT-BF': pass\n"
    given = ["--editing_method=LocFT-BF", f"--hparams_dir={yamls / 'ours.yaml'}"]
    assert method_of(yamls, *given, source=knows_us).arguments == given


def test_what_cannot_be_is_said_in_one_message(yamls):
    ours = f"--hparams_dir={yamls / 'ours.yaml'}"
    simie = "if args.editing_method == 'SimIE':\n    pass\n"
    with pytest.raises(LocFTError, match=r"run_it\.py runs methods of its own \(SimIE\), and has "):
        method_of(yamls, "--editing_method=LocFT-BF", ours, source=simie)
    with pytest.raises(HyperParamsError, match=r"ft\.yaml` is a YAML of FT, and"):
        method_of(yamls, "--editing_method=LocFT-BF", f"--hparams_dir={yamls / 'ft.yaml'}")
    with pytest.raises(HyperParamsError, match=r"nothing\.yaml` is none of its YAMLs"):
        method_of(yamls, "--editing_method=LocFT-BF", "--hparams_dir=nothing.yaml")


def test_a_refusal_of_the_script_is_told_from_an_error_in_it(tmp_path):
    source = (
        "def f(known):\n    assert known, 'not supported'\n    raise ValueError(\n    'no'\n)\n"
        "def g():\n    return {}['a']\n"
    )
    path = tmp_path / "script.py"
    names = {}
    exec(compile(source, str(path), "exec"), names)
    said = []
    for call in (lambda: names["f"](0), lambda: names["f"](1), names["g"], lambda: int("x")):
        try:
            call()
        except Exception as error:
            said.append(refusal(error, path, source))
    assert said == ["AssertionError: not supported", "ValueError: no", None, None]
