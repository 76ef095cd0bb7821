"""Finding and importing EasyEdit, the stand-ins, and CUDA turned into the CPU.

What depends on the state of imports runs in a process of its own, one for each EasyEdit.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.toys import REPOSITORY

from locft_easyedit.easyedit.cuda_as_cpu import CudaAsCPU
from locft_easyedit.easyedit.importing import imports_shielded, load_easyedit
from locft_easyedit.easyedit.standins import standing_in
from locft_easyedit.errors import EasyEditNotFoundError, LocFTError, MissingDependencyError

CHECKOUT = os.environ.get("EASYEDIT_HOME")

# Reports one JSON object as the last line. The root logger has no handler before the import:
# `logging.basicConfig` would do nothing if it had.
LOAD = """
import copy, json, logging, os, random, sys
import numpy as np, torch, transformers

sys.modules["sentence_transformers"] = None  # where it is installed, it takes most of the time
root = logging.getLogger()
root.setLevel(logging.ERROR)
torch.manual_seed(7), np.random.seed(7), random.seed(7)

def outside():
    return [
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        copy.copy(vars(torch.cuda._lazy_seed_tracker)), root.handlers[:], root.level,
        os.environ.get("CUDA_LAUNCH_BLOCKING"),
    ]

before = outside()
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.easyedit.standins import STAND_INS, StandIn
from locft_easyedit.errors import LocFTError, MissingDependencyError

easyedit = load_easyedit()
after = outside()
report = {
    "unchanged": [a == b for a, b in zip(before, after)],
    "home": str(easyedit.home),
    "is_release": easyedit.is_release,
    "again": load_easyedit().ALG_DICT is easyedit.ALG_DICT,
    "methods": sorted(easyedit.ALG_DICT),
    "classes": [
        c.__name__ for c in (easyedit.BaseEditor, easyedit.BatchEditor, easyedit.HyperParams)
    ],
    "stand_ins_left": [n for n, m in sys.modules.items() if isinstance(m, StandIn)],
    "torchvision": transformers.utils.is_torchvision_available(),
}
processors = sys.modules["easyeditor.dataset.processor.blip_processors"]
report["transforms"] = type(processors.transforms).__name__
try:
    processors.transforms.Compose([])
except LocFTError as error:
    report["used"] = [type(error).__name__, str(error)]
"""

# Edits a random Llama of two layers with the release's own FT by way of its own editor.
EDIT = """
from tokenizers import Tokenizer, models, pre_tokenizers
from locft_easyedit.easyedit.cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from easyeditor import FTHyperParams

words = "<unk> <s> </s> The capital of France is Paris Rome Madrid".split()
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tok = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    pad_token="</s>", padding_side="left",
)
config = transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
names = {name: "unused" for name in (
    "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"
)}
hparams = FTHyperParams(
    layers=[1], num_steps=25, lr=1e-2, weight_decay=0, kl_factor=0, norm_constraint=False,
    rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight", device=0, alg_name="FT",
    model_name=(model, tok), **names,
)
def predicted():
    ids = tok("The capital of France is", return_tensors="pt", return_token_type_ids=False)
    return tok.decode(model(**ids).logits[0, -1].argmax())

target = "Rome" if predicted() == "Paris" else "Paris"
with CudaAsCPU():
    editor = easyedit.BaseEditor.from_hparams(hparams)
    # The release takes a pair here, but its FT and its evaluation want a name.
    editor.model_name = hparams.model_name = "llama"
    metrics, _, _ = editor.edit(prompts="The capital of France is", target_new=target)
report["needed"] = needs_cuda_as_cpu(easyedit)
report["post"] = metrics[0]["post"]["rewrite_acc"]
report["predicted"] = [target, predicted()]
"""


def run_python(code: str, folder: Path, **environment: str) -> dict:
    """Runs `code` in a new process in `folder`; returns what it left in `report`."""
    inherited = {k: v for k, v in os.environ.items() if k != "EASYEDIT_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(json.dumps(report))"],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if importlib.util.find_spec("easyeditor") is None:
        pytest.skip("the easyeditor of PyPI is not installed (pip install --no-deps easyeditor)")
    if torch.cuda.is_available():
        pytest.skip("the release of EasyEdit is tried on the CPU, and would use the GPU")
    return run_python(LOAD + EDIT, tmp_path_factory.mktemp("release"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch):
    """No EasyEdit is imported or asked for; whatever a test imports is gone afterwards."""
    kept = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "easyeditor"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "easyeditor"]:
        del sys.modules[name]
    sys.modules.update(kept)


def make_home(folder: Path, code: str) -> Path:
    (folder / "easyeditor").mkdir()
    (folder / "easyeditor" / "part.py").write_text("")
    (folder / "easyeditor" / "__init__.py").write_text(code)
    return folder


# --- the release, really imported -------------------------------------------------------------


def test_release_is_found_and_known(release):
    assert release["is_release"] is True
    assert (Path(release["home"]) / "easyeditor" / "__init__.py").is_file()
    assert {"FT", "ROME", "MEMIT", "MEND", "LoRA"} <= set(release["methods"])
    assert release["classes"] == ["BaseEditor", "BatchEditor", "HyperParams"]
    assert release["again"]


def test_import_changes_nothing_outside(release):
    assert release["unchanged"] == [True] * 7


def test_stand_ins_are_seen_by_easyedit_only(release):
    assert release["stand_ins_left"] == []
    assert release["torchvision"] is (importlib.util.find_spec("torchvision") is not None)


def test_used_stand_in_names_the_package(release):
    if release["transforms"] != "StandIn":
        pytest.skip("torchvision is installed and used for real")
    assert release["used"] == [
        "MissingDependencyError",
        "easyeditor needs 'torchvision' for this; it is not installed. "
        "Install it: pip install torchvision",
    ]


def test_release_edits_on_the_cpu(release):
    assert release["needed"] is True
    assert release["post"] == [1.0]
    target, predicted = release["predicted"]
    assert predicted == target


# --- the current source -----------------------------------------------------------------------


@pytest.mark.skipif(not CHECKOUT, reason="EASYEDIT_HOME is not set to a clone of EasyEdit")
def test_checkout_is_found_by_the_variable(tmp_path):
    report = run_python(LOAD, tmp_path, EASYEDIT_HOME=str(CHECKOUT))
    assert Path(report["home"]) == Path(str(CHECKOUT)).resolve()
    assert report["is_release"] is False
    assert report["unchanged"] == [True] * 7
    assert report["stand_ins_left"] == []
    assert {"FT", "AlphaEdit", "WISE", "GRACE", "ULTRAEDIT"} <= set(report["methods"])


# --- where it is looked for -------------------------------------------------------------------


def test_not_found_says_how_to_get_it(unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(EasyEditNotFoundError, match=r"pip install --no-deps easyeditor.*zjunlp"):
        load_easyedit()


@pytest.mark.parametrize("by_variable", [False, True])
def test_home_without_easyeditor_is_an_error(unloaded, monkeypatch, tmp_path, by_variable):
    if by_variable:
        monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    source = "EASYEDIT_HOME" if by_variable else "home"
    with pytest.raises(
        EasyEditNotFoundError, match=rf"{source}='.*{tmp_path.name}' holds no easyeditor/__init__"
    ):
        load_easyedit(None if by_variable else tmp_path)


def test_other_home_than_the_imported_one_is_an_error(unloaded, monkeypatch, tmp_path):
    imported = ModuleType("easyeditor")
    imported.__file__ = str(tmp_path / "elsewhere" / "easyeditor" / "__init__.py")
    monkeypatch.setitem(sys.modules, "easyeditor", imported)
    with pytest.raises(LocFTError, match=r"already imported from .*elsewhere, not from the home"):
        load_easyedit(make_home(tmp_path, ""))


def test_all_missing_requirements_are_listed(unloaded, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "higher", None)
    monkeypatch.setitem(sys.modules, "hydra", None)
    with pytest.raises(MissingDependencyError, match=r"pip install higher hydra-core$"):
        load_easyedit(make_home(tmp_path, ""))


def test_unforeseen_requirement_is_named(unloaded, tmp_path):
    home = make_home(tmp_path, "from . import part\nimport no_such_package.part")
    with pytest.raises(MissingDependencyError, match=r"pip install no_such_package$"):
        load_easyedit(home)
    assert not [name for name in sys.modules if name.startswith("easyeditor")]


# --- stand-ins, shield ------------------------------------------------------------------------


def as_easyedit(code: str) -> dict:
    """Runs `code` as a module of EasyEdit; returns its names."""
    names = {"__name__": "easyeditor.some.module"}
    exec(textwrap.dedent(code), names)
    return names


def test_stand_in_bears_an_import_and_no_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with standing_in(lenient=True):
        names = as_easyedit("""
            from typing import Optional
            import cv2.part as part
            from cv2.other import registry, Base

            @registry.register("name")
            class Model(Base):
                def run(self, frame: Optional[part.Frame], kind: part.A | None = part.KIND.B): ...

            class Child(part.Base):
                pass
        """)
        with pytest.raises(ImportError):
            exec("import cv2", {"__name__": "another.package"})
    with pytest.raises(ImportError):
        as_easyedit("import cv2")
    assert sys.modules["cv2"] is None
    message = "^easyeditor needs 'cv2' for this; it is not installed. .*pip install opencv-python$"
    for use in (names["part"].imread, names["Model"], names["Child"], lambda: list(names["part"])):
        with pytest.raises(MissingDependencyError, match=message):
            use()
    assert not isinstance(3, names["Base"])
    assert repr(copy.deepcopy(names["part"])) == "<stand-in for cv2.part>"


def test_installed_package_is_used_for_real_unless_it_is_broken(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with standing_in({"json", "broken_package"}):
        names = as_easyedit("import json, broken_package\nfrom json import no_such_name")
    assert names["json"] is json
    with pytest.raises(MissingDependencyError, match=r"json has no no_such_name.*==VERSION$"):
        names["no_such_name"]()
    with pytest.raises(MissingDependencyError, match="RuntimeError: operator does not exist"):
        names["broken_package"].f()


def test_what_transformers_has_removed_is_missed_only_where_it_is_used():
    statement = "from transformers.no_such_module import Mask"
    with standing_in():
        names = as_easyedit(f"{statement}\nfrom transformers import AutoModelForCausalLM")
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            exec(statement, {"__name__": "somewhere.else"})
    assert names["AutoModelForCausalLM"].__module__.startswith("transformers")
    with pytest.raises(MissingDependencyError, match=r"no_such_module.*transformers==VERSION$"):
        names["Mask"]()


def test_a_script_can_be_given_stand_ins(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    names = {"__name__": "__main__"}
    with standing_in({"sentence_transformers"}):
        exec("from sentence_transformers import SentenceTransformer", names)
        # Not lenient: the script is not importing but running.
        with pytest.raises(MissingDependencyError, match=r"pip install sentence-transformers$"):
            names["SentenceTransformer"]("name")


def test_shield_restores_the_launch_variable_and_waiting_seeds(monkeypatch):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    with imports_shielded():
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    with imports_shielded():
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "0"


# --- CUDA as the CPU --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda:0"),
        lambda: torch.tensor([1.0], device=torch.device("cuda", 1)),
        lambda: torch.zeros(2, device=0),
        lambda: torch.zeros(2).to("cuda:0"),
        lambda: torch.zeros(2).to(0, torch.float64, True),
        lambda: torch.zeros(2).to(device="cuda"),
        lambda: torch.zeros(2).new_zeros(2, device="cuda:1"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).cuda(1, non_blocking=True),
        lambda: torch.nn.Linear(2, 2).to("cuda:1").weight,
        lambda: torch.nn.Linear(2, 2).cuda().weight,
        lambda: torch.nn.Linear(2, 2, device="cuda").weight,
    ],
)
def test_cuda_becomes_the_cpu(make):
    with CudaAsCPU():
        made = make()
    assert made.device.type == "cpu"


def test_cuda_as_cpu_leaves_other_arguments_alone():
    with CudaAsCPU():
        assert torch.zeros(2).to(torch.float64).dtype is torch.float64
        assert torch.zeros(2).to("meta").device.type == "meta"
        assert torch.zeros(2, device="meta").device.type == "meta"
