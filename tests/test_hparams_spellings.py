"""Names in any case, and the YAMLs of the paper's own code."""

import logging

import pytest
from helpers.toys import toy_hparams

from locft_easyedit.errors import HyperParamsError
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.hparams_spellings import known_alg_name

PAPER = """
model_name_or_path: "meta-llama/Meta-Llama-3-8B-Instruct"
data_path: "./data/zsre/zsre_3k.json"
save_model_dir: "./saves/llama_zsre3k"

layer: 22
rewrite_module: "model.layers.{}.mlp.down_proj.weight"

lr: 5.0e-4
batch_size: 100
num_steps: 25
device: 0
"""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("locft-bf", "LocFT-BF"),
        ("LocFT_BF", "LocFT-BF"),
        ("LOCFTBF", "LocFT-BF"),
        ("locft-bf+", "LocFT-BF+"),
        ("FT", "FT"),
        ("LocFT", "LocFT"),
        (None, None),
        (5, 5),
    ],
)
def test_spellings_of_the_name(value, name):
    assert known_alg_name(value) == name


def test_a_name_in_another_case_is_read_as_ours(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "alg_name: locft-bf+\nmodel_name: m\nlayers: [1]\nrewrite_module_tmp: a.{}\nlr: 1e-3\n"
    )
    hparams = LocFTBFHyperParams.from_hparams(path)
    assert hparams.alg_name == "LocFT-BF+"
    assert hparams.wrapped_forms
    assert hparams.preserved
    assert toy_hparams(alg_name="LOCFT-BF").alg_name == "LocFT-BF"
    with pytest.raises(HyperParamsError, match=r"`alg_name='ROME'` in It is another"):
        LocFTBFHyperParams.from_mapping({"alg_name": "ROME"}, source="It")


def test_the_papers_yaml_is_read(tmp_path, caplog):
    path = tmp_path / "llama3-8b.yaml"
    path.write_text(PAPER)
    with caplog.at_level(logging.INFO):
        read = LocFTBFHyperParams.from_hparams(path)
    assert (read.alg_name, read.model_name) == ("LocFT-BF", "meta-llama/Meta-Llama-3-8B-Instruct")
    assert (read.layers, read.rewrite_module_tmp) == ([22], "model.layers.{}.mlp.down_proj.weight")
    assert (read.lr, read.batch_size, read.num_steps, read.device) == (5e-4, 100, 25, 0)
    [record] = caplog.records
    assert "without `data_path` (`data=` here) and `save_model_dir` (`output=` here)" in (
        record.getMessage()
    )
    path.write_text(PAPER + "kl_factor: 0\n")
    with pytest.raises(HyperParamsError, match="`kl_factor` belongs to other methods"):
        LocFTBFHyperParams.from_hparams(path)
