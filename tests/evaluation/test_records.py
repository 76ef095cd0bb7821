"""Metrics in little memory: what comes out is what went in."""

import json
import math

import pytest

from locft_easyedit.evaluation.evaluation import PairedMetrics
from locft_easyedit.evaluation.records import CompactRecords
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.utils.output import write_json

N = 150  # more than two blocks


def record(i):
    return {
        "rewrite_acc": [i / 7, 1.0],
        "locality": {"neighborhood_output": [[i, 2 * i]]},
        "answer": f"line {i}\n\u2028 \\n é \ud800",
    }


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, N])
def test_records_come_out_as_they_went_in(n):
    expected = [record(i) for i in range(n)]
    kept = CompactRecords(record(i) for i in range(n))
    assert len(kept) == n
    assert list(kept) == expected
    assert [kept[i] for i in range(n)] == expected
    assert [kept[-i] for i in range(1, n + 1)] == expected[::-1]
    assert kept[1:70:3] == expected[1:70:3]


def test_numbers_that_json_lacks_are_kept():
    found = CompactRecords([{"a": math.nan, "b": math.inf, "c": 0.1 + 0.2}])[0]
    assert math.isnan(found["a"])
    assert found["b"] == math.inf
    assert found["c"] == 0.1 + 0.2


def test_a_changed_copy_changes_nothing():
    kept = CompactRecords(record(i) for i in range(N))
    for i in (3, N - 1):
        kept[i]["rewrite_acc"].append(5.0)
        assert kept[i] == record(i)


@pytest.mark.parametrize("index", [N, -N - 1])
def test_there_is_no_record_beyond_the_last(index):
    kept = CompactRecords(record(i) for i in range(N))
    with pytest.raises(IndexError, match=rf"record {index} of {N}"):
        kept[index]
    with pytest.raises(IndexError, match=rf"record {index} of {N}"):
        PairedMetrics([{}] * N, kept, kept)[index]


def test_records_take_a_fraction_of_the_memory():
    kept = CompactRecords(record(i) for i in range(N))
    assert sum(map(len, kept._blocks)) < 0.4 * len(json.dumps([record(i) for i in range(128)]))


def outputs(tokens):
    return {"locality": {"n_output": [tokens]}, "portability": {}, "rewrite_acc": [0.5]}


def joined():
    before = CompactRecords(outputs([i, 1]) for i in range(N))
    after = CompactRecords(outputs([0, 1]) for _ in range(N))
    return PairedMetrics([{"prompt": str(i)} for i in range(N)], before, after)


def test_what_only_the_comparison_tells_is_there_at_every_look():
    entries = joined()
    for _ in range(2):
        assert entries[0]["post"]["locality"]["n_acc"] == [1.0]
        assert entries[-1]["post"]["locality"]["n_acc"] == [0.5]
    assert [entry["case_id"] for entry in entries] == list(range(N))
    assert entries[-1]["case_id"] == N - 1
    assert entries[7]["requested_rewrite"] == {"prompt": "7"}
    assert [e["case_id"] for e in entries[5:8]] == [5, 6, 7]


def test_records_of_one_measurement_alone_are_refused():
    with pytest.raises(ValueError, match="2 records, 2 measured before and 1 after"):
        PairedMetrics([{}, {}], [{}, {}], [{}])


def test_a_summary_looks_once():
    once = (entry for entry in joined())
    found = summarize(once)["post"]
    assert found["rewrite_acc"] == 0.5
    assert found["locality"] == {"n_acc": pytest.approx((1 + 0.5 * (N - 1)) / N)}


def test_records_are_written_like_a_list(tmp_path):
    entries = joined()
    write_json(tmp_path / "lazy.json", {"records": entries})
    write_json(tmp_path / "list.json", {"records": list(entries)})
    written = (tmp_path / "lazy.json").read_text(encoding="utf-8")
    assert written == (tmp_path / "list.json").read_text(encoding="utf-8")
    assert json.loads(written)["records"] == list(entries)
