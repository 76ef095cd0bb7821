"""Stores what EasyEdit's own functions give for real records, or checks what is stored.

    EASYEDIT_HOME=path/to/EasyEdit python tests/helpers/store_easyedit_metrics.py          # write
    EASYEDIT_HOME=path/to/EasyEdit python tests/helpers/store_easyedit_metrics.py --check  # compare

Records of the public slices in ../shared/data, SmolLM2-135M-Instruct as it is ("pre") and with one
matrix halved ("post"), one record at a time through `compute_edit_quality`,
`finalize_locality_metrics` and `summary_metrics`. `test_easyedit_stored.py` compares our batched
metrics with the file, so that it needs no clone of EasyEdit.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from helpers.toys import REPOSITORY, SHARED_DATA
from locft_easyedit.cli.demo import NAME, prepare_smollm2
from locft_easyedit.data.readers import read_requests
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.loading import load_causal_lm

STORED = Path(__file__).with_name("easyedit_metrics.json")
SLICES = (
    "zsre_1k",
    "counterfact_1k",
    "wikidata_counterfact_400",
    "wikidata_recent_200",
    "knowedit_zsre_300",
)
N_RECORDS = 42  # of each slice: 210 in all
HPARAMS = LocFTBFHyperParams(
    layers=[27], rewrite_module_tmp="model.layers.{}.mlp.down_proj", lr=1e-3, device="cpu"
)


def model_and_tokenizer(folder):
    """The model as the stored figures were taken with it."""
    return load_causal_lm(str(folder), device="cpu")


@torch.no_grad()
def change_(model):
    """Something that changes many answers, and is the same everywhere."""
    model.model.layers[27].mlp.down_proj.weight.mul_(0.5)


def requests_of(name):
    """The records, without the keys that are ours alone."""
    return read_requests(SHARED_DATA / f"{name}.json", N_RECORDS)


def easyedit_metrics(model, tokenizer):
    """Everything by EasyEdit's own functions."""
    easyedit = load_easyedit()
    if easyedit.is_release:
        sys.exit("This needs the current source: set EASYEDIT_HOME to a clone of EasyEdit.")
    from easyeditor.editors.editor import finalize_locality_metrics
    from easyeditor.editors.utils import summary_metrics

    records = {name: requests_of(name) for name in SLICES}

    def measure(phase, eval_metric):
        # Locality and portability do not depend on `eval_metric`.
        without = () if eval_metric == "exact match" else ("locality", "portability")
        return {
            name: [
                easyedit.compute_edit_quality(
                    model,
                    "llama",
                    HPARAMS,
                    tokenizer,
                    {key: value for key, value in request.items() if key not in without},
                    "cpu",
                    eval_metric=eval_metric,
                )
                for request in tqdm(requests, desc=f"{phase} {eval_metric} {name}")
            ]
            for name, requests in records.items()
        }

    pre, ppl = measure("pre", "exact match"), measure("pre", "ppl")
    ood = measure("pre", "ood_ppl")
    change_(model)
    post = measure("post", "exact match")
    slices = {}
    for name in SLICES:
        metrics = [
            {"pre": a, "post": b, "requested_rewrite": request}
            for a, b, request in zip(pre[name], post[name], records[name], strict=True)
        ]
        for entry in metrics:
            finalize_locality_metrics(entry, entry["requested_rewrite"], HPARAMS, "llama")
        slices[name] = {
            "records": [{"pre": e["pre"], "post": e["post"]} for e in metrics],
            "ppl": [only_ppl(e) for e in ppl[name]],
            "ood": [e["ood_acc"] for e in ood[name]],
            "summary": printed_summary(summary_metrics, metrics),
        }
    return {"easyedit": commit_of(easyedit.home), "model": NAME, "slices": slices}


def only_ppl(entry):
    return {key: value for key, value in entry.items() if key.endswith("_ppl")}


def printed_summary(summary_metrics, metrics):
    """EasyEdit prints its means and returns nothing."""
    out, here = StringIO(), Path.cwd()
    with TemporaryDirectory() as folder, redirect_stdout(out):
        os.chdir(folder)  # it writes a log where it stands
        try:
            summary_metrics(metrics)
        finally:
            os.chdir(here)
    printed = re.search(r"Metrics Summary:  (.*)", out.getvalue()).group(1)
    summary = eval(printed, {"np": np, "nan": nan})
    summary.pop("metric_protocols", None)
    return summary


def commit_of(home):
    command = ["git", "-C", str(home), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored file")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    folder = prepare_smollm2(REPOSITORY / "models" / NAME)
    fresh = json.loads(json.dumps(easyedit_metrics(*model_and_tokenizer(folder))))
    if options.check:
        same = json.loads(STORED.read_text())["slices"] == fresh["slices"]
        print("the stored figures are EasyEdit's" if same else "the stored figures DIFFER")
        return 0 if same else 1
    STORED.write_text(json.dumps(fresh, separators=(",", ":")) + "\n")
    print(f"{STORED}: {STORED.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
