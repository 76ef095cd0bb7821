"""What the output embedding is given: a slice would make a CPU copy its matrix for each row."""

import pytest
import torch
from helpers.toys import toy_model, toy_tokenizer

from locft_easyedit.modeling.forward import run_next
from locft_easyedit.modeling.modes import forward_replaced, only_trainable
from locft_easyedit.modeling.sampling import continuations, seeded

IDS = torch.tensor([[0, 7, 8, 9], [5, 6, 7, 8], [4, 3, 9, 8]])


@pytest.fixture
def watched():
    """A model, and what its output embedding has been given."""
    model, given = toy_model("llama"), []
    head = model.get_output_embeddings()
    forward = head.forward

    def noted(hidden):
        given.append(hidden)
        return forward(hidden)

    with forward_replaced(head, noted), only_trainable(model, []):
        yield model, given


def test_sampling_gives_it_rows_that_follow_one_another(watched):
    model, given = watched
    mask = (IDS != 0).long()
    with seeded(model, 3):
        continuations(model, toy_tokenizer(), IDS, mask, 3)
        assert given
        assert all(hidden.shape[:2] == (3, 1) for hidden in given)
        assert all(hidden.is_contiguous() for hidden in given)
        given.clear()
        model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2)
    assert not given[0].is_contiguous()  # what transformers itself gives it


def test_the_next_token_of_many_prompts_likewise(watched):
    model, given = watched
    with torch.no_grad():
        logits, _ = run_next(model, None, input_ids=IDS)
        [hidden] = given
        assert hidden.shape[:2] == (3, 1)
        assert hidden.is_contiguous()
        expected = torch.stack([model(input_ids=row[None]).logits[0, -1] for row in IDS])
    torch.testing.assert_close(logits, expected)
