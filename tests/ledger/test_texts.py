"""Groups of facts joined, and mini-batches with old facts drawn beside new ones."""

import numpy as np
from helpers.toys import toy_requests, toy_tokenizer

from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.data.variants import Replayed, Variants
from locft_easyedit.ledger.texts import Numbered, joined_texts, joined_variants


def texts_of(requests):
    return tokenize_edits(toy_tokenizer(), distinct_edits(requests).edits)


def test_joined_texts_are_those_of_all_together():
    requests = toy_requests(5)
    joined = joined_texts([texts_of(requests[:2]), texts_of(requests[2:3]), texts_of(requests[3:])])
    together = texts_of(requests)
    for name in ("ids", "offsets", "target_start"):
        assert np.array_equal(getattr(joined, name), getattr(together, name))


def test_joined_variants():
    some = Variants.in_turns(np.array([2, 4]), 2, seed=3)
    joined = joined_variants([Variants.own_alone(2), some])
    assert joined.most == some.most
    for epoch in range(4):
        assert joined.texts(np.array([1]), epoch).tolist() == [1]
        found = joined.texts(np.array([2, 3]), epoch)
        assert (found - 2).tolist() == some.texts(np.array([0, 1]), epoch).tolist()
    numbered = Numbered(None, joined, {7: 0, 8: 1, 5: 2, 9: 3}, n_forms=3)
    assert numbered.edits([9, 7]).tolist() == [3, 0]
    # The own text and those in forms, not the rewordings.
    assert numbered.checked(np.array([1, 2, 3])).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert numbered.edits_of(np.array([0, 4, 3, 6])).tolist() == [0, 2, 3]


def test_old_facts_beside_new_ones():
    variants = Variants.own_alone(20)
    replayed = Replayed.of(variants, 1, np.arange(10), seed=1)
    batch = np.array([12, 15, 11])
    first = replayed.texts(batch, 0)
    assert first[:3].tolist() == batch.tolist()
    assert len(set(first[3:])) == 3
    assert set(first[3:]) <= set(range(10))
    assert first.tolist() == replayed.texts(batch, 0).tolist()
    drawn = {int(i) for epoch in range(30) for i in replayed.texts(batch, epoch)[3:]}
    assert drawn == set(range(10))
    assert replayed.most == 2
    few = Replayed.of(variants, 1, np.array([4]), seed=1)
    assert few.texts(batch, 0).tolist() == [12, 15, 11, 4]
    alone = Replayed.of(variants, 1, np.zeros(0, np.int64), seed=1)
    assert alone.texts(batch, 0).tolist() == batch.tolist()
    assert alone.most == 1
