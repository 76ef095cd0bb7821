"""The demo itself, on a few facts: the real model, through EasyEdit."""

import json

import pytest

from locft_easyedit.cli.demo import main
from locft_easyedit.hparams_rules import ALG_NAMES


@pytest.mark.slow
def test_the_demo_edits_the_real_model(smollm2, tmp_path, capsys):
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    import locft_easyedit

    try:
        assert main(["--n", "6", "--output", str(tmp_path), "--model", str(smollm2)]) == 0
    finally:
        locft_easyedit.unregister()
    shown = capsys.readouterr().out
    assert "EasyEdit: " in shown
    for method in ALG_NAMES:
        metrics = json.loads((tmp_path / method / "metrics.json").read_text())
        after = metrics["summary"]["post"]
        assert after["generated"]["reliability"] >= 0.95
        assert after["rewrite_acc"] >= 0.95
        assert metrics["summary"]["pre"]["generated"]["reliability"] <= 0.2
        assert (tmp_path / method / "loss.png").stat().st_size > 5000
        assert (tmp_path / method / "edit.safetensors").is_file()
        assert method in shown
    assert after["wrapped"]["chat_reliability"] >= 0.8  # of LocFT-BF+
    for heading in ("asked plainly", "chat template", "Metrics", "Seconds"):
        assert heading in shown
