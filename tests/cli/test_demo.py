"""The demo itself, on a few facts: the real model, through EasyEdit."""

import json

import pytest

from locft_easyedit.cli.demo import main


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
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    after = metrics["summary"]["post"]
    assert after["generated"]["reliability"] >= 0.95
    assert after["rewrite_acc"] >= 0.95
    assert metrics["summary"]["pre"]["generated"]["reliability"] <= 0.2
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert (tmp_path / "edit.safetensors").is_file()
    for heading in ("A few questions", "Metrics", "Seconds"):
        assert heading in shown
