"""What the output embedding is given: a slice would make a CPU copy its matrix for each row."""

import pytest
import torch
from helpers.toys import toy_model, toy_tokenizer

from locft_easyedit.modeling.forward import mean_by_owner, run_next
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


def test_the_mean_of_each_owner_and_its_gradient():
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = mean_by_owner(values, owner, 4)
    assert torch.allclose(found, torch.stack([values[owner == i].mean() for i in range(4)]))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (found * weights).sum().backward()
    assert torch.equal(values.grad, (weights / torch.tensor([2, 1, 3, 1]))[owner])


@pytest.mark.gpu
def test_a_gpu_adds_up_in_the_same_order_at_every_run():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    owner = torch.arange(100).repeat_interleave(torch.arange(1, 101))
    values = torch.randn(len(owner), generator=torch.Generator().manual_seed(0))
    device = torch.device("cuda")
    runs = [mean_by_owner(values.to(device), owner.to(device), 100) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert torch.allclose(runs[0].cpu(), mean_by_owner(values, owner, 100), atol=1e-6)
