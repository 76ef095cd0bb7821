"""One expert of a mixture, and the shared one: an edit is learned, and nothing else moves."""

import copy

import pytest
import torch
from helpers.ledgers import new_ledger, opened
from helpers.reference import naive_locft_bf
from helpers.toys import toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.errors import PlaceError
from locft_easyedit.modeling.parameter_slices import ParameterSlice, whole_name
from locft_easyedit.training.session import EditSession
from locft_easyedit.training.trained_weights import TrainedWeights

DOWN, GATE_UP = (f"model.layers.{{}}.mlp.experts.{part}_proj" for part in ("down", "gate_up"))
SHARED = "model.layers.{}.mlp.shared_expert.down_proj.weight"
N = 10


def edited(model, **changes):
    """Returns the result of an edit that is quick, and long enough to be learned."""
    h = toy_hparams(**{"rewrite_module_tmp": f"{DOWN}[3]", "num_steps": 4, "lr": 5e-3} | changes)
    return edit_model(model, toy_tokenizer(), toy_requests(N), h, progress=False)


def masked(model, templates, layers, **changes):
    """Returns the result where all experts are trained, with the others' gradients zero."""
    parameters = dict(model.named_parameters())
    kept = {}
    for template in templates:
        for layer in layers:
            whole, _, expert = template.format(layer)[:-1].partition("[")
            kept.setdefault(whole, []).append(int(expert))

    def alone(experts):
        def hook(gradient):
            only = torch.zeros_like(gradient)
            only[experts] = gradient[experts]
            return only

        return hook

    for whole, experts in kept.items():
        parameters[whole].requires_grad_(True).register_hook(alone(experts))
    names = sorted({whole_name(template) for template in templates})
    return edited(model, rewrite_module_tmp=names, layers=layers, **changes)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("templates", "changes"),
    [
        ([f"{DOWN}[3]"], {}),
        ([f"{DOWN}[0]"], {"packing": False, "frozen_prefix": False, "micro_batch_size": 3}),
        ([f"{DOWN}[1]", f"{GATE_UP}[1]", f"{DOWN}[2]"], {"layers": [1, 2]}),
    ],
    ids=["one", "in parts", "several"],
)
def test_it_is_the_training_of_all_with_the_others_gradients_zero(kind, dtype, templates, changes):
    model, reference = toy_model(kind).to(dtype), toy_model(kind).to(dtype)
    layers = changes.pop("layers", [2])
    result = edited(model, rewrite_module_tmp=templates, layers=layers, **changes)
    expected = masked(reference, templates, layers, **changes)
    changes["layers"] = layers
    assert result.step_losses == expected.step_losses
    assert set(result.new) == {template.format(i) for template in templates for i in layers}
    for name, value in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    for name, value in result.new.items():
        whole = whole_name(name)
        expert = int(name[len(whole) + 1 : -1])
        assert torch.equal(value, expected.new[whole][expert])
        assert not torch.equal(value, result.original[name])
        assert value.shape == expected.new[whole].shape[1:]


def test_it_is_the_naive_training():
    model = toy_model("qwen2_moe")
    reference = copy.deepcopy(model)
    result = edited(model)
    whole = reference.get_parameter(DOWN.format(2))

    def alone(gradient):
        only = torch.zeros_like(gradient)
        only[3] = gradient[3]
        return only

    whole.register_hook(alone)
    h = toy_hparams(num_steps=4, lr=5e-3)
    steps, _ = naive_locft_bf(reference, toy_tokenizer(), toy_requests(N), [whole], h)
    assert result.step_losses == pytest.approx(steps, abs=5e-6)  # see `test_loop`
    [(name, value)] = result.new.items()
    change = whole[3].detach() - result.original[name]
    assert (value - whole[3]).norm() <= 1e-5 * change.norm()


def known(model, requests):
    """Returns which share of the targets' tokens, and of their ends, a model says."""
    tokenizer, found = toy_tokenizer(), []
    for request in requests:
        n_prompt = len(tokenizer(request["prompt"])["input_ids"])
        text = f"{request['prompt']} {request['target_new'].strip()}"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        said = model(input_ids=ids).logits[0, n_prompt - 1 : -1].argmax(-1)
        found.append(float((said == ids[0, n_prompt:]).float().mean()))
    return sum(found) / len(found)


# An expert can teach those tokens alone that are routed to it: here three or two of four.
@pytest.mark.parametrize(
    ("kind", "template", "config", "least"),
    [
        ("qwen2_moe", SHARED, {}, 1.0),
        ("qwen2_moe", f"{DOWN}[3]", {"num_experts_per_tok": 3}, 0.6),
        ("mixtral", f"{DOWN}[3]", {}, 0.6),
    ],
)
def test_an_edit_is_learned_and_the_rest_is_as_it_was(kind, template, config, least):
    model, requests = toy_model(kind, **config), toy_requests(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert known(model, requests) == 0
    h = toy_hparams(
        layers=[3], rewrite_module_tmp=template, num_steps=100, lr=0.05, health_check=False
    )
    result = edit_model(model, toy_tokenizer(), requests, h, progress=False)
    assert known(model, requests) >= least
    name = template.format(3)
    for other, value in model.state_dict().items():
        moved = value != before[other]
        if other == name:
            assert moved.any()
        elif other == whole_name(name):
            assert moved[3].any()
            assert not moved[[0, 1, 2]].any()
        else:
            assert not moved.any(), other
    with result.switched_off(model):
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    after = {n: v.clone() for n, v in model.state_dict().items()}
    result.restore_(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    result.apply_(model)
    assert all(torch.equal(v, after[n]) for n, v in model.state_dict().items())


def test_only_the_slice_is_held(monkeypatch):
    """Masters, originals and gradients of one expert, and none of the others' afterwards."""
    model = toy_model("mixtral").to(torch.bfloat16)
    whole = model.get_parameter(DOWN.format(2))
    made = []
    init = TrainedWeights.__init__

    def noted(self, parameters, **options):
        init(self, parameters, **options)
        made.append(self)

    monkeypatch.setattr(TrainedWeights, "__init__", noted)
    whole.grad = held = torch.ones_like(whole)
    result = edited(model)
    [weights] = made
    [part] = weights.parameters.values()
    assert isinstance(part, ParameterSlice)
    assert part.data_ptr() == whole[3].data_ptr()
    sizes = {t.numel() for t in (*weights.masters, *weights.original.values(), part)}
    assert sizes == {whole[3].numel()} == {result.new[f"{DOWN.format(2)}[3]"].numel()}
    assert whole.grad is held  # the program's own
    assert bool((held == 1).all())
    assert not whole._post_accumulate_grad_hooks


def test_an_interruption_within_the_training_leaves_the_model_as_it_was(monkeypatch):
    model = toy_model("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    n_calls = iter(range(3))
    copied = TrainedWeights.copy_masters_to_model_

    def interrupted(self):
        copied(self)
        if next(n_calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainedWeights, "copy_masters_to_model_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edited(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "lora"}, r"LoRA changes nothing else"),
        ({"preserve": ["neighbours"]}, r"a change of it cannot be confined"),
    ],
)
@pytest.mark.parametrize("template", [DOWN, f"{DOWN}[3]"])
def test_what_needs_a_linear_layer_is_refused(changes, message, template):
    routed = r"`{}` is no matrix of a linear layer \(it belongs to MixtralExperts, whose experts "
    routed += r"get not all tokens, but those that the router gives each\), and {}"
    name = template.format(2).replace("[", r"\[").replace("]", r"\]")
    model = toy_model("mixtral")
    with pytest.raises(PlaceError, match=routed.format(name, message)):
        edited(model, rewrite_module_tmp=template, **changes)
    assert not any(p.requires_grad is False for p in model.parameters())


def test_the_shared_expert_is_preserved_and_takes_lora():
    model = toy_model("qwen2_moe")
    common = {"rewrite_module_tmp": SHARED, "num_steps": 2}
    low_rank = edited(copy.deepcopy(model), tuning="lora", lora_rank=2, **common)
    assert low_rank.lora is not None
    h = toy_hparams(**common, preserve=["neighbours"])
    with EditSession(model, toy_tokenizer(), toy_requests(N), h, progress=False) as session:
        assert list(session.train_().new) == [SHARED.format(2)]


def test_a_kept_prefix_does_not_depend_on_the_expert(tmp_path):
    """A later edit of another expert, on top of the first, finds the same states."""
    model = toy_model("mixtral")
    edited(model, prefix_dir=str(tmp_path))
    [file] = tmp_path.glob("prefix-*.safetensors")
    edited(model, prefix_dir=str(tmp_path), rewrite_module_tmp=f"{DOWN}[1]")
    assert list(tmp_path.glob("prefix-*.safetensors")) == [file]


def test_a_ledger_keeps_one_expert(tmp_path):
    settings = {"rewrite_module_tmp": f"{DOWN}[3]", "prefix_cut": "mlp"}
    model, requests = toy_model("mixtral"), toy_requests(3)
    ledger = new_ledger(tmp_path, model=model, **settings)
    ledger.add(requests)
    before, whole = toy_model("mixtral"), DOWN.format(2)
    moved = model.get_parameter(whole) != before.get_parameter(whole)
    assert moved[3].any()
    assert not moved[:3].any()
    again = opened(tmp_path, model=before)
    assert torch.equal(again.model.get_parameter(whole), model.get_parameter(whole))
    again.retract(since="2000-01-01", exact=True)
    assert torch.equal(again.model.get_parameter(whole), toy_model("mixtral").get_parameter(whole))
