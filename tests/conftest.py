import functools
import json
import logging
import os

# Before torch is imported. Tests run in parallel, each with one thread: sums are then the same on
# every machine, and idle threads that spin would make a shared one crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from helpers.toys import (
    REPOSITORY,
    SHARED_DATA,
    TOY_YAML,
    loaded_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from hypothesis import settings

from locft_easyedit.errors import MissingDependencyError
from locft_easyedit.evaluation.wrapped import Wrapped

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None)  # how long it takes depends on what else runs
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def root_logging():
    """Puts the root logger back: Hydra and EasyEdit configure it for the whole program."""
    root = logging.getLogger()
    level, handlers = root.level, set(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - handlers:
        if not type(handler).__module__.startswith("_pytest"):  # those come and go by themselves
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the embedded model, unpacked by the first process that asks for it."""
    from locft_easyedit.cli.demo import NAME, prepare_smollm2

    folder = REPOSITORY / "models" / NAME
    folder.parent.mkdir(exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock")):
            return prepare_smollm2(folder)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def short_answers(monkeypatch):
    """Answers end after 16 tokens; every target of the toys has fewer.

    The answers of a random model seldom end by themselves, and 32 tokens show no more.
    """
    monkeypatch.setattr("locft_easyedit.evaluation.generated.MAX_NEW_TOKENS", 16)
    short = functools.partial(Wrapped, max_new_tokens=16)
    monkeypatch.setattr("locft_easyedit.evaluation.evaluation.Wrapped", short)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of the public benchmark files, which are no part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the public benchmark files in ../shared/data, beside the repository")
    return SHARED_DATA


@pytest.fixture
def easyedit():
    """EasyEdit with LocFT-BF registered: the release, or what EASYEDIT_HOME leads to."""
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    import locft_easyedit

    yield locft_easyedit.register()
    locft_easyedit.unregister()


@pytest.fixture
def editor(easyedit):
    """A LocFTBFEditor with a toy model."""
    return easyedit.BaseEditor.from_hparams(loaded_hparams())


@pytest.fixture
def toy_folder(tmp_path, monkeypatch):
    """A folder with a model, edits and hparams, as the current one."""
    toy_model("llama").save_pretrained(tmp_path / "toy")
    toy_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "toy")
    (tmp_path / "edits.json").write_text(json.dumps(toy_requests(6)))
    (tmp_path / "toy.yaml").write_text(TOY_YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path
