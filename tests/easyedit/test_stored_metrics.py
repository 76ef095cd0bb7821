"""Our batched metrics on 210 real records against what EasyEdit's own functions gave for them.

The figures in helpers/easyedit_metrics.json were made by store_easyedit_metrics.py, which
repeats it all against a clone of EasyEdit.
"""

import json
import math

import numpy as np
import pytest
from helpers.store_easyedit_metrics import N_RECORDS, SLICES, STORED, change_, model_and_tokenizer
from helpers.toys import REPOSITORY

from locft_easyedit.data.readers import read_requests
from locft_easyedit.evaluation.evaluation import Evaluation, finish_
from locft_easyedit.evaluation.perplexity import Perplexity
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut

# float32 rounding of a mean of token losses; EasyEdit runs each text alone.
PPL_TOLERANCE = 1e-4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())["slices"]


@pytest.fixture(scope="module")
def records(shared_data):
    return {name: read_requests(shared_data / f"{name}.json", N_RECORDS) for name in SLICES}


@pytest.fixture(scope="module")
def measured(smollm2, records):
    """All slices before and after, as one evaluation with the frozen prefix shared."""
    model, tokenizer = model_and_tokenizer(smollm2)
    everything = [request for name in SLICES for request in records[name]]
    frozen = layer_cut(find_layers(model), 27)
    evaluation = Evaluation(
        model, tokenizer, everything, EvalConfig(batch_size=50, frozen=frozen), metrics=["accuracy"]
    )
    ppl = Perplexity(model, tokenizer, everything, EvalConfig()).measure("")
    ood = Perplexity(model, tokenizer, everything, EvalConfig(), metric="ood_ppl").measure("")
    pre = evaluation.measure()
    change_(model)
    post = evaluation.measure()
    for before, after in zip(pre, post, strict=True):
        finish_(before, after)
    parts = {"pre": pre, "post": post, "ppl": ppl, "ood": ood}
    return {
        name: {what: values[i * N_RECORDS : (i + 1) * N_RECORDS] for what, values in parts.items()}
        for i, name in enumerate(SLICES)
    }


def as_json(value):
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("phase", ["pre", "post"])
@pytest.mark.parametrize("name", SLICES)
def test_every_key_of_every_record(stored, measured, name, phase):
    assert len(stored[name]["records"]) == N_RECORDS
    for theirs, ours in zip(stored[name]["records"], measured[name][phase], strict=True):
        assert as_json(ours) == as_json(theirs[phase])


@pytest.mark.parametrize("name", SLICES)
def test_summary(stored, measured, name):
    metrics = [
        {"pre": pre, "post": post}
        for pre, post in zip(measured[name]["pre"], measured[name]["post"], strict=True)
    ]
    ours, theirs = summarize(metrics), stored[name]["summary"]
    assert ours == theirs
    # The stored edit changes something: a comparison of two equal models would prove little.
    before, after = theirs["pre"]["rewrite_acc"], theirs["post"]["rewrite_acc"]
    assert before != after


@pytest.mark.parametrize("name", SLICES)
def test_perplexities(stored, measured, name):
    for theirs, ours in zip(stored[name]["ppl"], measured[name]["ppl"], strict=True):
        assert set(theirs) == {key for key in ours if key.endswith("_ppl")}
        for key, value in theirs.items():
            assert math.isclose(ours[key], value, rel_tol=PPL_TOLERANCE)
    ood = [entry["ood_acc"] for entry in measured[name]["ood"]]
    assert ood == stored[name]["ood"]
    assert np.std(ood) > 0


def test_the_stored_file_says_where_it_is_from():
    assert len(json.loads(STORED.read_text())["easyedit"]) >= 7
    assert (REPOSITORY / "tests" / "helpers" / "store_easyedit_metrics.py").is_file()
