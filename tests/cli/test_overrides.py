"""Arguments on their way to Hydra: read as `read_arguments` does, and put into Hydra's grammar."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from locft_easyedit.cli.compare import CompareConfig
from locft_easyedit.cli.edit import EditConfig
from locft_easyedit.cli.overrides import hydra_overrides
from locft_easyedit.errors import HyperParamsError


def overrides(*arguments, sweep=False, config_class=EditConfig):
    return hydra_overrides(config_class, arguments, command="edit", sweep=sweep)


def read(argument):
    """Returns what Hydra reads in an argument."""
    [found] = OverridesParser.create().parse_overrides([argument])
    return found


def value(argument):
    """Returns what Hydra reads in what an argument becomes."""
    [written] = overrides(argument)
    return read(written).value()


TEXTS = (
    "a b.json", "a=b", "a (copy)/x.json", "50%.json", "a,b.json", "模型/数据.json", "it's.json",
    'a"b', "[a].json", "{a}", "C:\\data\\", "a\\'b", "2024", "1e3", "true", "a: b", "#1", " x",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_stands(text):
    assert value(f"data={text}") == text
    assert value(f"prefix_dir={text}") == text
    if not text.startswith("["):
        assert value(f"model_name={text}") == text


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1))
def test_whatever_the_text(text):
    quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
    if text.strip() and "${" not in text and not quoted:
        assert value(f"data={text}") == text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("layers=27", [27]),
        ("layers=20,21", [20, 21]),
        ("layers=[20,21]", [20, 21]),
        ("layers=auto", "auto"),
        ("lr=1e-3", 1e-3),
        ("lr=auto", "auto"),
        ("n=5", 5),
        ("n=null", None),
        ("resume=false", False),
        ("device=0", 0),
        ("device=cuda:1", "cuda:1"),
        ("metrics=generated", ["generated"]),
        ("metrics=[accuracy, generated]", ["accuracy", "generated"]),
        ("preserve=sampled,a b.txt", ["sampled", "a b.txt"]),
        ("rewrite_module_tmp=h.{}.mlp.up_proj.weight", "h.{}.mlp.up_proj.weight"),
        ("rewrite_module_tmp=[a.{}.b,a.{}.c]", ["a.{}.b", "a.{}.c"]),
    ],
)
def test_values_have_the_type_of_their_key(argument, expected):
    assert value(argument) == expected


@pytest.mark.parametrize(
    "argument",
    ["data='a b'", 'data="a=b"', "output=${now:%Y}", "hydra.job.name=x", "+a=1", "~lr", "-m"],
)
def test_what_is_hydras_is_left_to_it(argument):
    assert overrides(argument) == [argument]


def test_other_dictionaries_of_a_command_are_open():
    written = overrides("peers.FT.lr=1", config_class=CompareConfig)
    assert written == ["++peers.FT.lr=1"]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("lr=1e-3,2e-3", ["0.001", "0.002"]),
        ("layers=20,21", ["[20]", "[21]"]),
        ("layers=[20],[21]", ["[20]", "[21]"]),
        ("rewrite_module_tmp=a.{}.b,a.{}.c", ["a.{}.b", "a.{}.c"]),
        ("data=a (1).json,b.json", ["a (1).json", "b.json"]),
    ],
)
def test_in_a_multirun_commas_stand_between_runs(argument, values):
    [written] = overrides(argument, sweep=True)
    found = read(written)
    assert found.is_sweep_override()
    assert [str(getattr(v, "text", v)) for v in found.sweep_iterator()] == values


def test_all_mistakes_are_one_message():
    wrong = ["num_step=3", "n=three", "lr=fast", "foo", "--num_steps=3", "layers=[a]", "data= "]
    with pytest.raises(HyperParamsError) as error:
        overrides("seed=1", *wrong)
    assert str(error.value).split("\n") == [
        "The arguments cannot be used:",
        "  - `num_step` is not a key. Did you mean `num_steps`?",
        "  - `n=three` must be a whole number or null.",
        "  - `lr=fast` must be a number or auto.",
        "  - `foo` is no KEY=VALUE. Quote values with spaces.",
        "  - `--num_steps=3` is no option here. Write num_steps=3.",
        "  - `layers=[a]` must be a list of whole numbers, such as [1,2] or auto.",
        "  - `data= ` must be a text.",
        "`locft edit --help` names all keys.",
    ]
