"""Frozen matrices of one input as one product: fewer products, the same step, no memory held."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from locft_easyedit.modeling.fsdp import ShardedLayers, note_sharded
from locft_easyedit.modeling.fused_linears import FusedLinears, find_fused
from locft_easyedit.prefix import probes, shortcuts, step_probes
from locft_easyedit.training.session import EditSession

PLACES = DOWN_PROJECTION | {"qwen2_moe": "model.layers.{}.mlp.shared_expert.down_proj.weight"}
# How many frozen matrices there are in a layer, and in how many products they run.
KINDS = {
    "llama": ("self_attn.q_proj, k_proj, v_proj; mlp.gate_proj, up_proj", True),
    "qwen2": ("self_attn.q_proj, k_proj, v_proj; mlp.gate_proj, up_proj", True),
    "gemma3": ("self_attn.q_proj, k_proj, v_proj; mlp.gate_proj, up_proj", True),
    "mixtral": ("self_attn.q_proj, k_proj, v_proj", True),
    "qwen2_moe": ("self_attn.q_proj, k_proj, v_proj; mlp.shared_expert.gate_proj, up_proj", True),
    "gptj": ("attn.q_proj, k_proj, v_proj", True),
    "phi3": ("", False),  # fused already
    "gpt_neox": ("", False),
    "gpt2": ("", False),  # fused, and no `nn.Linear`
}
GROUPED = [kind for kind, (_, grouped) in KINDS.items() if grouped]


class Products(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        self.n += packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        return func(*args, **(kwargs or {}))


def session(kind="llama", *, fused=True, model=None, **changes):
    model = toy_model(kind) if model is None else model
    settings = {"layers": [1], "rewrite_module_tmp": PLACES[kind]} | changes
    return EditSession(
        model, toy_tokenizer(), toy_requests(10), toy_hparams(**settings), False, fused=fused
    )


def one_step(kind, fused, dtype):
    """The losses of one step in the model's precision, the gradient, and the products it took."""
    made = session(kind, fused=fused)
    made.check()
    made.model.to(dtype)  # now, for float64 is not for training
    if dtype == torch.float64 and hasattr(made.model.config, "num_experts_per_tok"):
        made.model.set_experts_implementation("eager")  # PyTorch's grouped product takes none
    with made as prepared:
        assert (prepared.shortcuts.fused is not None) is (fused and KINDS[kind][1])
        runner, every = prepared._runner, np.arange(len(prepared.edits.edits))
        assert runner.replays
        with runner.running(), torch.enable_grad(), Products() as products:
            logits, rows = runner.logits(every)
            labels = runner.ids[rows.label_index]
            losses = F.cross_entropy(logits, labels, reduction="none")
            losses.mean().backward()
        [trained] = prepared.place.parameters.values()
        gradient, trained.grad = trained.grad, None
    return losses.detach(), gradient, products.n


# Sums in another order round otherwise: by the last of 53, 24 and 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_losses_and_gradients_of_a_step(kind, dtype):
    tolerance = TOLERANCE[dtype]
    losses, gradient, n_apart = one_step(kind, False, dtype)
    found, other, n_fused = one_step(kind, True, dtype)
    assert probes.relative_error(found, losses) < tolerance
    assert gradient.norm() > 0
    assert probes.relative_error(other, gradient) < tolerance
    if not KINDS[kind][1]:
        assert n_fused == n_apart
        return
    # Two layers above the place run whole, forward and backward, each with these groups.
    saved = sum(len(group.split(",")) - 1 for group in KINDS[kind][0].split(";"))
    if kind in ("llama", "qwen2", "gemma3", "gptj"):  # the prefix ends above the place's attention
        assert n_apart - n_fused == 2 * 2 * saved
    assert n_fused < n_apart


@pytest.mark.parametrize("kind", KINDS)
def test_which_matrices_run_together(kind):
    with session(kind) as prepared:
        names = {module: name for name, module in prepared.model.named_modules()}
        fused = prepared.shortcuts.fused
        found = [] if fused is None else [[names[m] for m in g.modules] for g in fused.groups]
    stack = prepared.place.stack.path
    expected = []
    for layer in (1, 2, 3):  # below them nothing runs in a step
        for group in filter(None, KINDS[kind][0].split("; ")):
            first, *others = group.split(", ")
            parent = first.rpartition(".")[0]
            expected.append(
                [f"{stack}.{layer}.{n}" for n in (first, *(f"{parent}.{o}" for o in others))]
            )
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tuning": "lora"},
        {"alg_name": "LocFT-BF+", "preserve": ["neighbours"]},
        {"prefix_cut": "layer", "micro_batch_size": 3},
        {"frozen_prefix": False},
        {"rewrite_module_tmp": "model.layers.{}.self_attn.k_proj.weight"},
    ],
    ids=str,
)
def test_a_training_is_the_same(changes):
    apart, together = (session(fused=fused, num_steps=2, **changes) for fused in (False, True))
    with apart, together:
        assert apart.shortcuts.fused is None
        trained = {id(p) for p in together.place.parameters.values()}
        groups = together.shortcuts.fused.groups
        assert not any(id(m.weight) in trained for group in groups for m in group.modules)
        expected, found = apart.train_(), together.train_()
    np.testing.assert_allclose(found.step_losses, expected.step_losses, rtol=1e-5)
    assert found.n_updates == expected.n_updates > 0


def test_the_model_is_as_before_afterwards():
    model = toy_model("qwen2")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    n_bytes = sum(p.nbytes for p, _ in before.values())
    with session("qwen2", model=model):
        q, k = (model.get_submodule(f"model.layers.2.self_attn.{n}_proj") for n in "qk")
        for name in ("weight", "bias"):
            one, other = getattr(q, name), getattr(k, name)
            assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        check_values(model, before)
        # Nothing is there twice.
        storages = {p.untyped_storage()._cdata: p for p in model.parameters()}.values()
        assert sum(p.untyped_storage().nbytes() for p in storages) == n_bytes
    check_values(model, before)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def check_values(model, before):
    assert list(model.state_dict()) == list(before)
    for name, parameter in model.named_parameters():
        own, value = before[name]
        assert parameter is own
        assert torch.equal(parameter, value)
        assert torch.equal(model.state_dict()[name], value)


def test_it_is_for_gpus_where_nobody_says_otherwise(monkeypatch):
    with session(fused=None) as prepared:
        assert prepared.shortcuts.fused is None
    monkeypatch.setattr(shortcuts, "input_device", lambda model: torch.device("cuda"))
    with session(fused=None) as prepared:
        assert prepared.shortcuts.fused is not None
    with session(fused=False) as prepared:
        assert prepared.shortcuts.fused is None


def test_what_changes_the_logits_or_the_gradient_is_not_used(monkeypatch, caplog):
    caplog.set_level("DEBUG", logger="locft_easyedit.prefix")
    found = step_probes.find_fused

    def of_unlike_inputs(*args):
        fused = found(*args)
        for group in fused.groups:
            group._sizes.sort()  # 16, 16, 32: not those of q, k and v
        return fused

    monkeypatch.setattr(step_probes, "find_fused", of_unlike_inputs)
    model = toy_model("llama")
    with session(model=model) as prepared:
        assert prepared.shortcuts.fused is None
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert "A shortcut cannot be used" in caplog.text

    def without_gradient(*args):
        fused = found(*args)
        for group in fused.groups:
            own = group._part
            group._part = lambda i, given, own=own: own(i, given).detach()
        return fused

    caplog.clear()
    monkeypatch.setattr(step_probes, "find_fused", without_gradient)
    with session() as prepared:
        assert prepared.shortcuts.fused is None
    assert "Matrices of one input run each for itself" in caplog.text


# One group by itself: two matrices of three and of two rows.


@pytest.fixture
def pair():
    torch.manual_seed(0)
    modules = [nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)]
    for module in modules:
        module.requires_grad_(False)
    fused = FusedLinears([modules])
    with fused.laid_out(), fused.running():
        yield *modules, fused.groups[0]


def alone(module, given):
    return F.linear(given, module.weight, module.bias)


def given_to(grad=True):
    return torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=grad)


def test_whoever_comes_first_computes_and_nothing_is_kept(pair):
    one, other, group = pair
    given = given_to()
    for first, second in ((one, other), (other, one)):
        with Products() as products:
            a, b = first(given), second(input=given)
        assert products.n == 1
        torch.testing.assert_close(a, alone(first, given))
        torch.testing.assert_close(b, alone(second, given))
        assert not group._parts
        gone = weakref.ref(a), weakref.ref(b)
        del a, b
        assert [one() for one in gone] == [None, None]


@pytest.mark.parametrize("order", ["aab", "abab", "aba", "bb"])
def test_called_again(pair, order):
    given = given_to()
    for letter in order:
        module = pair["ab".index(letter)]
        torch.testing.assert_close(module(given), alone(module, given))


def test_another_input_in_between_or_written_into(pair):
    one, other, _ = pair
    given, different = given_to(False), given_to(False)
    one(given)
    torch.testing.assert_close(other(different), alone(other, different))
    one(given)
    given.mul_(2)
    torch.testing.assert_close(other(given), alone(other, given))


def test_a_part_computed_without_gradients_is_not_taken_with_them(pair):
    one, other, _ = pair
    given = given_to()
    with torch.no_grad():
        one(given)
    assert other(given).requires_grad
    with torch.inference_mode():
        inferred = given_to(False)
        for module in (one, other):
            torch.testing.assert_close(module(inferred), alone(module, inferred))


def test_what_a_failed_pass_left_goes_with_its_input(pair):
    one, _, group = pair
    given = given_to()
    one(given * 2)  # nobody else has the input
    assert not group._parts
    held = given * 2
    one(held)
    [part] = group._parts.values()
    gone = weakref.ref(part)
    del part, held
    gc.collect()
    assert gone() is None
    one(given)
    assert group._parts


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(pair, reentrant):
    one, other, group = pair

    def block(given):
        hidden = given.tanh()
        return (one(hidden)[..., :2] * other(hidden)).sin()

    given = given_to()
    checkpoint(block, given, use_reentrant=reentrant).sum().backward()
    found, given.grad = given.grad, None
    hidden = given.tanh()
    (alone(one, hidden)[..., :2] * alone(other, hidden)).sin().sum().backward()
    torch.testing.assert_close(found, given.grad, rtol=1e-12, atol=1e-14)
    del hidden
    assert not group._parts


def test_weights_that_are_moved_or_trained_meanwhile_run_as_they_are(pair):
    one, other, _ = pair
    given = given_to()
    other.weight.requires_grad_(True)
    other(given).sum().backward()
    assert other.weight.grad is not None
    other.weight.requires_grad_(False)
    other.weight.data = other.weight.data * 3
    for module in (one, other):
        torch.testing.assert_close(module(given), alone(module, given))


def test_weights_that_were_moved_stay_where_they_are():
    modules = [nn.Linear(4, 3), nn.Linear(4, 2)]
    with FusedLinears([modules]).laid_out():
        moved = modules[0].weight.data = modules[0].weight.data * 3
    assert modules[0].weight.data_ptr() == moved.data_ptr()


# What is left alone.


class Block(nn.Module):
    """Two linear layers of one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.requires_grad_(False)

    def forward(self, given):
        return self.a(given) + self.b(given)


def found_in(block, trained=(), run=None):
    given = torch.randn(2, 4)
    return find_fused(block, [block], trained, run or (lambda: block(given)))


class OwnLinear(nn.Linear):
    """A linear layer that may do anything."""


def _own_class(block):
    block.b.__class__ = OwnLinear


def _own_forward(block):
    block.b.forward = block.b.forward  # as accelerate replaces it, to bring weights from elsewhere


def _tied(block):
    block.b.weight = block.a.weight


def _view(block):
    block.b.weight = nn.Parameter(torch.randn(8, 4)[:4], requires_grad=False)


def _without_bias(block):
    block.b.bias = None


LEFT_ALONE = {
    "hook before": lambda block: block.b.register_forward_pre_hook(lambda *_: None),
    "hook after": lambda block: block.b.register_forward_hook(lambda *_: None),
    "hook of the gradient": lambda block: block.b.register_full_backward_hook(lambda *_: None),
    "trainable": lambda block: block.b.requires_grad_(True),
    "class of its own": _own_class,
    "forward of its own": _own_forward,
    "tied": _tied,
    "view of another tensor": _view,
    "other precision": lambda block: block.b.double(),
    "bias in one alone": _without_bias,
    "sharded": lambda block: note_sharded(block, ShardedLayers(1, None, None)),
}


def test_two_plain_ones_are_found():
    [group] = found_in(Block()).groups
    assert len(group.modules) == 2


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_left_alone(what):
    block = Block()
    LEFT_ALONE[what](block)
    given = torch.randn(2, 4)

    def run():
        block.a(given)
        block.b(given.to(block.b.weight.dtype) if what == "other precision" else given)

    assert found_in(block, run=run) is None


def test_what_will_be_trained_is_left_alone():
    block = Block()
    assert found_in(block, trained=[block.b.weight]) is None


def test_calls_of_unlike_inputs_are_not_fused():
    block, given = Block(), torch.randn(2, 4)

    def of_a_copy():
        block.a(given), block.b(given.clone())

    def written_into():
        block.a(given)
        given.mul_(2)
        block.b(given)

    def twice():
        block.a(given), block.b(given), block.b(given)

    for run in (of_a_copy, written_into, twice):
        assert found_in(block, run=run) is None


def test_adapters_are_left_alone():
    model = toy_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), model)
    ids = torch.arange(5)[None]
    fused = find_fused(model, model.model.layers, (), lambda: model(input_ids=ids))
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    found = [[names[m] for m in group.modules] for group in fused.groups]
    assert found == [["gate_proj", "up_proj"]] * 4
