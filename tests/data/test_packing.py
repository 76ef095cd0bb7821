"""Rows: every token once, at its position, and nothing that could be taken for its neighbour."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from locft_easyedit.data.batching import length_sorted_batches
from locft_easyedit.data.packing import lay_out
from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.prefix.frozen_prefix import Layout


class Case:
    """Random sequences, a random batch of them, and a random length of rows."""

    def __init__(self, seed, *, later_positions=False):
        random = np.random.default_rng(seed)
        n = int(random.integers(1, 30))
        # Short ones are frequent, as edits are; a few are longer than a row.
        lengths = random.integers(2, int(random.choice([3, 8, 40])) + 1, size=n)
        starts = [int(random.integers(1, length + (seed % 3 == 0))) for length in lengths]
        # Ids tell their places apart, whatever the batch.
        ids = np.arange(lengths.sum()) + 1000
        sequences = np.split(ids, np.cumsum(lengths)[:-1])
        self.texts = TokenizedTexts.from_lists([s.tolist() for s in sequences], starts)
        self.batch = random.permutation(n)[: random.integers(1, n + 1)]
        self.row_tokens = int(random.choice([1, 8, 32, 128]))
        # Small numbers: they often equal the position that ends the sequence before.
        self.first_position = random.integers(0, 12, size=n) if later_positions else None

    def lay_out(self, packed):
        return lay_out(
            self.texts,
            self.batch,
            row_tokens=self.row_tokens,
            packed=packed,
            first_position=self.first_position,
        )

    def cells(self, member):
        """The flat indices of the tokens that are run: all but a sequence's last."""
        i = self.batch[member]
        return list(range(self.texts.offsets[i], self.texts.offsets[i + 1] - 1))

    def targets(self, member):
        i = self.batch[member]
        first = self.texts.offsets[i] + self.texts.target_start[i]
        return list(range(first, self.texts.offsets[i + 1]))

    def states(self, member):
        """Where the states of these tokens lie in a store: one after another, no gaps."""
        spans = list(itertools.pairwise(self.texts.offsets.tolist()))
        before = sum(end - start - 1 for start, end in spans[: self.batch[member]])
        return list(range(before, before + len(self.cells(member))))

    def start(self, member):
        return 0 if self.first_position is None else int(self.first_position[self.batch[member]])


def where(rows):
    """Returns the row and column of each token."""
    return {
        int(token): (row, column)
        for row, line in enumerate(rows.token_index.tolist())
        for column, token in enumerate(line)
        if token >= 0
    }


CASES = st.builds(Case, st.integers(0, 2**32 - 1), later_positions=st.booleans())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@given(case=CASES)
def test_every_token_once_and_in_its_place(case, packed):
    rows = case.lay_out(packed)
    expected = [token for member in range(len(case.batch)) for token in case.cells(member)]
    assert sorted(rows.token_index[rows.real].tolist()) == sorted(expected)
    places = where(rows)
    for member in range(len(case.batch)):
        row, column = places[case.cells(member)[0]]
        for step, token in enumerate(case.cells(member)):
            assert places[token] == (row, column + step)
            assert rows.position_ids[row, column + step] == case.start(member) + step
        states = rows.state_index[row, column : column + len(case.cells(member))]
        assert states.tolist() == case.states(member)
    assert torch.equal(rows.state_index >= 0, rows.real)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@given(case=CASES)
def test_scored_cells_precede_their_labels(case, packed):
    rows = case.lay_out(packed)
    # In the order of the batch, and of the target's tokens.
    expected = [
        (token - 1, token, member)
        for member in range(len(case.batch))
        for token in case.targets(member)
    ]
    scored_tokens = rows.token_index.flatten()[rows.scored].tolist()
    found = zip(scored_tokens, rows.label_index.tolist(), rows.owner.tolist(), strict=True)
    assert list(found) == expected


@given(case=CASES)
def test_packed_rows_are_blocks_of_one_sequence(case):
    rows = case.lay_out(packed=True)
    assert rows.attention_mask is None
    # As transformers tells sequences apart. It gives nothing to tell where no row is packed.
    blocks = find_packed_sequence_indices(rows.position_ids)
    if blocks is None:
        blocks = torch.zeros_like(rows.position_ids)
        assert all(len(set(line)) == len(line) for line in rows.position_ids.tolist())
    places = where(rows)
    taken = set()
    for member in range(len(case.batch)):
        cells = [places[token] for token in case.cells(member)]
        ids = {(row, int(blocks[row, column])) for row, column in cells}
        assert len(ids) == 1
        assert not ids & taken
        taken |= ids
    filler = [
        (row, int(blocks[row, column]))
        for row, column in (~rows.real).nonzero(as_tuple=False).tolist()
    ]
    assert not set(filler) & taken


@given(case=CASES)
def test_packed_rows_are_bounded_and_few(case):
    rows = case.lay_out(packed=True)
    lengths = case.texts.input_lengths[case.batch]
    capacity = max(case.row_tokens, lengths.max())
    n_rows, n_columns = rows.token_index.shape
    used = rows.real.sum(1)
    assert n_columns == int(used.max()) <= capacity
    assert n_rows <= len(case.batch)
    # Filler is on the right only.
    assert rows.real.tolist() == [[c < n for c in range(n_columns)] for n in used.tolist()]
    if case.first_position is None:
        # First-fit opens a row only if no other has room: at most one is half empty.
        assert int((used * 2 <= capacity).sum()) <= 1


@given(case=CASES)
def test_padded_rows(case):
    rows = case.lay_out(packed=False)
    lengths = case.texts.input_lengths[case.batch].tolist()
    width = max(lengths)
    assert rows.token_index.shape == (len(lengths), width)
    assert torch.equal(rows.attention_mask, rows.real.long())
    assert rows.real.tolist() == [[column < n for column in range(width)] for n in lengths]
    # Filler stays at the last position: no position beyond the sequence's own is used.
    for member, n in enumerate(lengths):
        last = case.start(member) + n - 1
        assert rows.position_ids[member, n:].tolist() == [last] * (width - n)


@given(case=CASES)
def test_both_layouts_score_the_same(case):
    packed, padded = case.lay_out(packed=True), case.lay_out(packed=False)
    assert torch.equal(packed.label_index, padded.label_index)
    assert torch.equal(packed.owner, padded.owner)
    pairs = [rows.token_index.flatten()[rows.scored] for rows in (packed, padded)]
    assert torch.equal(*pairs)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_tensors(packed):
    rows = Case(5).lay_out(packed)
    tensors = [tensor for tensor in vars(rows).values() if tensor is not None]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert rows.real.dtype == torch.bool
    assert int(rows.gather_index.min()) >= 0
    assert torch.equal(rows.gather_index[rows.real], rows.token_index[rows.real])
    moved = rows.to(torch.device("meta"))
    assert (moved.attention_mask is None) == packed
    assert all(tensor.is_meta for tensor in vars(moved).values() if tensor is not None)


def sequences(*lengths):
    return TokenizedTexts.from_lists([[7] * n for n in lengths], [1] * len(lengths))


def test_known_packing():
    rows = lay_out(sequences(3, 5, 2), [0, 1, 2], row_tokens=5, packed=True)
    assert rows.token_index.tolist() == [[3, 4, 5, 6, 8], [0, 1, -1, -1, -1]]
    assert rows.state_index.tolist() == [[2, 3, 4, 5, 6], [0, 1, -1, -1, -1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert rows.owner.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert rows.scored.tolist() == [5, 6, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(("second", "n_rows"), [(1, 1), (2, 2), (3, 1)])
def test_position_that_would_continue_gets_another_row(second, n_rows):
    first_position = np.array([0, second])
    rows = lay_out(
        sequences(3, 2), [0, 1], row_tokens=10, packed=True, first_position=first_position
    )
    assert len(rows.token_index) == n_rows


@pytest.mark.parametrize("packed", [True, False])
def test_one_sequence_twice_in_a_batch(packed):
    rows = lay_out(sequences(2, 3), [1, 0, 1], row_tokens=20, packed=packed)
    assert sorted(rows.token_index[rows.real].tolist()) == [0, 2, 2, 3, 3]
    assert rows.label_index.tolist() == [3, 4, 1, 3, 4]
    assert rows.owner.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_length_sorted_batches(batch_size):
    lengths = np.random.default_rng(0).integers(2, 9, size=23)
    batches = length_sorted_batches(lengths, batch_size)
    order = np.concatenate(batches).tolist()
    # Longest first, and in the given order among equals.
    assert order == sorted(range(23), key=lambda i: (-lengths[i], i))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 1 <= len(batches[-1]) <= batch_size


def test_a_gpu_records_more_states_at_once():
    texts = TokenizedTexts.from_lists([[1] * 9] * 3000, [8] * 3000)  # of which eight tokens run
    layout = Layout(texts, 64, packed=True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert layout.recorded_at_once(cpu, 64) == 64
    assert layout.recorded_at_once(gpu, 64) == 1024
    assert layout.recorded_at_once(gpu, 2000) == 2000
