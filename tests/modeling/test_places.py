"""The place: exactly the parameters that layers and templates name, or one clear refusal."""

from types import SimpleNamespace

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, TOY_KINDS, toy_model
from torch import nn

from locft_easyedit.errors import PlaceError
from locft_easyedit.modeling.places import find_layers, number_of_layers, select_place

DOWN = "model.layers.{}.mlp.down_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def llama():
    return toy_model("llama")


def refusal(model, layers, templates):
    """Returns the lines of the one error, and that nothing about the model changed."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(PlaceError, match="Nothing is trained:") as caught:
        select_place(model, layers, templates)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    title, *lines = str(caught.value).split("\n")
    assert title == "Nothing is trained:"
    return lines


# What is selected


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_down_projection(kind):
    model = toy_model(kind)
    name = DOWN_PROJECTION[kind].format(2)
    place = select_place(model, [2], [DOWN_PROJECTION[kind]])
    assert list(place.parameters) == [name]
    assert place.parameters[name] is dict(model.named_parameters())[name]
    assert place.first_layer == 2
    assert len(place.stack.layers) == 4
    assert place.stack.layers is model.get_submodule(place.stack.path)


@pytest.mark.parametrize(
    ("layers", "templates", "names", "first"),
    [
        ([0], [DOWN], [DOWN.format(0)], 0),
        ([3, 1], [DOWN], [DOWN.format(3), DOWN.format(1)], 1),
        ([1, 2], [DOWN, UP], [t.format(i) for i in (1, 2) for t in (DOWN, UP)], 1),
        # Named twice, trained once:
        ([1], [DOWN, DOWN, "model.layers.{}.mlp.down_proj"], [DOWN.format(1)], 1),
        ([1], ["model.layers.{}.mlp.down_proj."], [DOWN.format(1)], 1),
        ([2], ["lm_head.weight"], ["lm_head.weight"], None),
        ([2], [DOWN, "lm_head"], [DOWN.format(2), "lm_head.weight"], None),
        ([2, 3], ["model.norm"], ["model.norm.weight"], None),
    ],
    ids=lambda x: str(x)[:40],
)
def test_names(llama, layers, templates, names, first):
    place = select_place(llama, layers, templates)
    assert list(place.parameters) == names
    assert place.first_layer == first
    everywhere = dict(llama.named_parameters())
    assert all(place.parameters[name] is everywhere[name] for name in names)


@pytest.mark.parametrize("template", ["model.layers.{}", "model.layers.{}."])
def test_whole_layer(llama, template):
    place = select_place(llama, [2], [template])
    expected = {f"model.layers.2.{name}" for name, _ in llama.model.layers[2].named_parameters()}
    assert set(place.parameters) == expected
    assert len(expected) == 9
    assert place.first_layer == 2


@pytest.mark.parametrize("template", ["model.layers.{}", "model.layers.{}.", DOWN])
@pytest.mark.parametrize("layer", [1, 2])
def test_layer_2_is_not_layer_20(template, layer):
    model = toy_model("llama", num_hidden_layers=24)
    place = select_place(model, [layer], [template])
    assert {name.split(".")[2] for name in place.parameters} == {str(layer)}


@pytest.mark.parametrize(
    "template", ["model.layers.{}.mlp.down", "model.layers.{}.ml", "layers.{}.mlp.down_proj.weight"]
)
def test_parts_of_names_match_nothing(llama, template):
    (line,) = refusal(llama, [2], [template])
    assert f"`rewrite_module_tmp={template!r}` matches nothing in layer 2." in line


@pytest.mark.parametrize("dot", ["", "."])
def test_module_with_a_bias(dot):
    model = toy_model("gpt2")
    place = select_place(model, [1], ["transformer.h.{}.mlp.c_proj" + dot])
    names = ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"]
    assert list(place.parameters) == names


# What is refused


@pytest.mark.parametrize("layers", [[4], [-1], [0, 4, 99]])
def test_out_of_range(llama, layers):
    (line,) = refusal(llama, layers, [DOWN])
    outside = [layer for layer in layers if not 0 <= layer < 4]
    assert line == (
        f"  - `layers={outside}` is out of range; LlamaForCausalLM has 4 layers (0 to 3). "
        "Choose among them."
    )


def test_model_is_called_by_its_name(llama):
    llama.config._name_or_path = "some/model"
    (line,) = refusal(llama, [7], [DOWN])
    assert "some/model has 4 layers" in line


def test_no_match_tells_what_the_layer_has(llama):
    (line,) = refusal(llama, [1], ["transformer.h.{}.mlp.c_proj.weight"])
    names = ", ".join(name for name, _ in llama.model.layers[1].named_parameters())
    assert line == (
        "  - `rewrite_module_tmp='transformer.h.{}.mlp.c_proj.weight'` matches nothing in layer 1. "
        f"`model.layers.{{}}` has: {names}. Choose among them."
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("end", ["head", "embedding"])
def test_tied_embeddings(kind, end):
    model = toy_model(kind, tie_word_embeddings=True)
    embedding = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[kind] + ".weight"
    name, other = ("lm_head.weight", embedding) if end == "head" else (embedding, "lm_head.weight")
    (line,) = refusal(model, [1], [name])
    assert line.startswith(f"  - `{name}` is tied to {other}; an edit would change both.")
    # The rest of such a model can be trained, and untied embeddings as well.
    assert select_place(model, [1], [DOWN_PROJECTION[kind]]).first_layer == 1
    assert list(select_place(toy_model(kind), [1], [name]).parameters) == [name]


@pytest.mark.parametrize("share", [lambda p: p, lambda p: nn.Parameter(p.data)])
def test_layers_that_share_their_numbers(llama, share):
    first, second = llama.model.layers[1].mlp.down_proj, llama.model.layers[2].mlp.down_proj
    second.weight = share(first.weight)
    (line,) = refusal(llama, [1], [DOWN])
    assert f"`{DOWN.format(1)}` is tied to {DOWN.format(2)};" in line
    assert len(refusal(llama, [1, 2], [DOWN])) == 2
    assert list(select_place(llama, [3], [DOWN]).parameters) == [DOWN.format(3)]


def spoil(model, layer, how):
    module = model.model.layers[layer].mlp.down_proj
    values = module.weight.data
    if how == "meta":
        module.weight = nn.Parameter(values.to("meta"))
    elif how == "quant_state":
        module.weight.quant_state = object()
    else:
        module.weight = nn.Parameter(values.to(how), requires_grad=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("meta", "is not loaded (meta device). Load the model's weights first."),
        (torch.int8, "is torch.int8; only floating-point weights"),
        (torch.uint8, "is torch.uint8; only floating-point weights"),
        ("quant_state", "is quantized; only floating-point weights"),
        (torch.float8_e4m3fn, "is torch.float8_e4m3fn; train float32, bfloat16 or float16"),
    ],
)
def test_untrainable_parameter(llama, how, message):
    spoil(llama, 1, how)
    (line,) = refusal(llama, [1, 2], [DOWN])
    assert line.startswith(f"  - `{DOWN.format(1)}` {message}")
    assert list(select_place(llama, [2], [DOWN]).parameters) == [DOWN.format(2)]


def test_model_on_the_meta_device():
    with torch.device("meta"):
        model = toy_model("llama")
    assert len(refusal(model, [0, 1], [DOWN, UP])) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_point_is_trained(llama, dtype):
    place = select_place(llama.to(dtype), [1], [DOWN])
    assert [parameter.dtype for parameter in place.parameters.values()] == [dtype]


def test_all_problems_in_one_error():
    model = toy_model("llama", tie_word_embeddings=True)
    spoil(model, 0, "meta")
    spoil(model, 1, torch.int8)
    lines = refusal(model, [0, 1, 2], [DOWN, "lm_head", "model.layers.{}.mlp.down"])
    for part in (
        "layer 0.",
        "layer 1.",
        "layer 2.",
        "(meta device)",
        "is torch.int8",
        "`lm_head.weight` is tied to model.embed_tokens.weight",
    ):
        assert sum(part in line for line in lines) == 1
    assert len(lines) == 6


def test_range_and_template_in_one_error(llama):
    lines = refusal(llama, [1, 9], ["model.layers.{}.nothing"])
    assert sum("`layers=[9]` is out of range" in line for line in lines) == 1
    assert sum("matches nothing in layer 1." in line for line in lines) == 1


# Models of other builds


class Plain(nn.Module):
    """Two lists as long as the number of layers; the deeper one comes first."""

    def __init__(self, n_layers=2, config=None):
        super().__init__()
        self.side = nn.Module()
        self.side.inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(n_layers))
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(n_layers))
        if config is not None:
            self.config = config


def test_list_nearest_to_the_root_is_the_stack():
    model = Plain(config=SimpleNamespace(num_hidden_layers=2))
    assert find_layers(model).path == "blocks"
    assert find_layers(model).layers is model.blocks
    assert select_place(model, [1], ["blocks.{}"]).first_layer == 1
    assert select_place(model, [1], ["side.inner.{}.bias"]).first_layer is None


@pytest.mark.parametrize(
    "config", [None, SimpleNamespace(), SimpleNamespace(num_hidden_layers=5)], ids=str
)
def test_without_a_stack(config):
    model = Plain(config=config)
    assert find_layers(model) is None
    place = select_place(model, [1], ["blocks.{}.weight"])
    assert list(place.parameters) == ["blocks.1.weight"]
    assert (place.first_layer, place.stack) == (None, None)
    (line,) = refusal(model, [3], ["blocks.{}.weight"])
    assert "matches nothing in layer 3. The model has: side.inner.0.weight" in line


def test_configured_number_is_a_bound_without_a_stack():
    model = Plain(config=SimpleNamespace(num_hidden_layers=5))
    (line,) = refusal(model, [5], ["blocks.{}.weight"])
    assert "`layers=[5]` is out of range; Plain has 5 layers (0 to 4)" in line


def test_layers_of_the_text_part_count():
    text = SimpleNamespace(num_hidden_layers=2)
    config = SimpleNamespace(num_hidden_layers=7, get_text_config=lambda: text)
    model = Plain(config=config)
    assert number_of_layers(model) == 2
    assert find_layers(model).path == "blocks"


# One expert of a fused parameter

EXPERTS = DOWN_PROJECTION["mixtral"]


def test_one_expert_is_a_parameter_with_the_same_numbers():
    model = toy_model("mixtral")
    place = select_place(model, [1, 2], [f"{EXPERTS}[3]", f"{EXPERTS}[0]", f"{EXPERTS}[3]"])
    assert list(place.parameters) == [
        f"{EXPERTS.format(i)}[{expert}]" for i in (1, 2) for expert in (3, 0)
    ]
    assert place.first_layer == 1
    for name, part in place.parameters.items():
        whole, expert = model.get_parameter(name[:-3]), int(name[-2])
        assert isinstance(part, nn.Parameter)
        assert part.data_ptr() == whole[expert].data_ptr()
        with torch.no_grad():
            part.add_(1)
        assert torch.equal(part, whole[expert])
    with torch.inference_mode():
        [part] = select_place(model, [1], [f"{EXPERTS}[3]"]).parameters.values()
    assert not part.is_inference()


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("mixtral", f"{EXPERTS}[4]", "names expert '4'; `model.layers.2.mlp.experts.down_proj` has "
         "4 experts (0 to 3). Choose among them."),
        ("mixtral", f"{EXPERTS}[-1]", "names expert '-1'; "),
        ("mixtral", f"{EXPERTS}[]", "names expert ''; "),
        ("mixtral", f"{EXPERTS}[03]", "names expert '03'; "),
        ("mixtral", f"{EXPERTS}[{10**12}]", "has 4 experts (0 to 3)"),
        ("mixtral", "model.layers.{}.mlp.experts[0]", "`model.layers.2.mlp.experts`, and that is a "
         "module, not the matrices of all experts, [experts, out, in]. Leave out `[0]`."),
        ("llama", f"{DOWN}[0]", "and that is a parameter of shape [32, 64], not the matrices"),
        ("mixtral", "model.layers.{}.mlp.experts.sideways[0]", "matches nothing in layer 2."),
    ],
)  # fmt: skip
def test_an_expert_that_is_not_there_is_refused(kind, template, message):
    [line] = refusal(toy_model(kind), [2], [template])
    assert line.startswith(f"  - `rewrite_module_tmp={template!r}`")
    assert message in line


@pytest.mark.parametrize("other", [EXPERTS, "model.layers.{}.mlp", "model.layers.{}."])
def test_an_expert_beside_all_of_them_is_refused(other):
    [line] = refusal(toy_model("mixtral"), [2], [f"{EXPERTS}[1]", other])
    assert line == (
        "  - `model.layers.2.mlp.experts.down_proj[1]` is a part of "
        "`model.layers.2.mlp.experts.down_proj`, which is selected as well. Name one of them."
    )


def test_experts_that_are_shared_or_not_loaded_are_refused():
    model = toy_model("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[2].mlp.experts
    [line] = refusal(model, [2], [f"{EXPERTS}[1]"])
    assert "is tied to model.layers.1.mlp.experts.down_proj" in line
    with torch.device("meta"):
        model = toy_model("mixtral")
    [line] = refusal(model, [2], [f"{EXPERTS}[1]"])
    assert "is not loaded" in line
