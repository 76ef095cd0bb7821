"""A command's arguments: what is accepted, and one message for everything that is not."""

from dataclasses import dataclass, field
from typing import Any, List, Optional, Union  # noqa: UP035

import pytest

from locft_easyedit.cli.arguments import read_arguments
from locft_easyedit.errors import HyperParamsError


@dataclass(kw_only=True)
class Config:
    model: str
    data: str
    output: str = "outputs"
    note: Optional[str] = None  # noqa: UP045
    lr: float = 1e-3
    n: int = 3
    limit: Optional[int] = 7  # noqa: UP045
    device: Optional[Union[int, str]] = None  # noqa: UP007, UP045
    tasks: List[str] = field(default_factory=lambda: ["a"])  # noqa: UP006
    layers: Optional[List[int]] = None  # noqa: UP006, UP045
    flag: bool = False
    anything: Any = None


def read(*arguments):
    return read_arguments(Config, arguments, command="try", positional=("model",))


def test_defaults_stay():
    assert read("m", "data=d") == Config(model="m", data="d")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr=1e-4", 1e-4),
        ("lr=3", 3.0),
        ("n=12", 12),
        ("limit=null", None),
        ("limit=5", 5),
        ("device=0", 0),
        ("device=cuda:1", "cuda:1"),
        ("device=null", None),
        ("flag=true", True),
        ("flag=false", False),
        ("layers=[1,2]", [1, 2]),
        ("layers=null", None),
        ("tasks=[mmlu,wmt16-de-en]", ["mmlu", "wmt16-de-en"]),
        ("tasks=mmlu", ["mmlu"]),
        ("tasks=a b,c", ["a b", "c"]),
        ("layers=3", [3]),
        ("layers=3,4", [3, 4]),
        ("anything=[a.{}.b,c.{}.d]", ["a.{}.b", "c.{}.d"]),
        ("tasks=[no, 1e3, 007]", ["no", "1e3", "007"]),
        ("anything=[1,a]", [1, "a"]),
        ("output=a=b/c = d #e: f", "a=b/c = d #e: f"),
        ("output=1e3", "1e3"),
        ("output=null", "null"),
        ("output=[x", "[x"),
        ("output=${HOME}/x", "${HOME}/x"),
        ("note=two\nlines", "two\nlines"),
        ("note=null", None),
        ("note=", None),
    ],
    ids=str,
)
def test_a_value_has_its_fields_type(argument, value):
    got = getattr(read("m", "data=d", argument), argument.partition("=")[0])
    assert got == value
    assert type(got) is type(value)


def test_places_may_hold_equals_signs_and_stand_anywhere():
    assert read("./lr=1e-3/model", "data=d").model == "./lr=1e-3/model"
    assert read("data=d", "runs/lr=1/model").model == "runs/lr=1/model"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lr=fast", r"`lr=fast` must be a number\."),
        ("lr=true", r"`lr=true` must be a number\."),
        ("n=1.5", r"`n=1\.5` must be a whole number\."),
        ("n=null", r"`n=null` must be a whole number\."),
        ("n=[1", r"`n=\[1` must be a whole number\."),
        ("n=${lr}", r"`n=\$\{lr\}` must be a whole number\."),
        ("limit=x", r"`limit=x` must be a whole number or null\."),
        ("flag=maybe", r"`flag=maybe` must be true or false\."),
        ("tasks=[[a]]", r"must be a list of names"),
        ("layers=[a]", r"must be a list of whole numbers, such as \[1,2\] or null\."),
        ("output=", r"`output=` must be a text\."),
        ("limt=3", r"`limt` is not a key\. Did you mean `limit`\?"),
        ("quux=3", r"`quux` is not a key\. See the keys below\.\nKeys: data, output, note, lr"),
        ("model=x", r"`model=` is given by its place"),
        ("--limit=3", r"`--limit=3` is no option here\. Write limit=3\."),
        ("--limit", r"Write limit=VALUE\."),
        ("data=e", r"`data` is given twice\. Keep one of them\."),
        ("b]", r"`b\]` is one too many\. Quote values with spaces\."),
    ],
    ids=str,
)
def test_a_mistake_is_named(argument, message):
    with pytest.raises(HyperParamsError, match=message):
        read("m", "data=d", argument)


def test_all_mistakes_are_one_error():
    with pytest.raises(HyperParamsError) as caught:
        read("n=x", "limt=3", "--lr")
    lines = str(caught.value).split("\n")
    assert len(lines) == 7
    for part in ("`n=x`", "`limt`", "`--lr`", "MODEL is missing", "`data` is missing"):
        assert sum(part in line for line in lines) == 1
    assert "`locft try --help`" in lines[-1]


def test_the_dataclass_own_rules_hold():
    @dataclass(kw_only=True)
    class Strict:
        n: int = 1

        def __post_init__(self):
            if self.n < 1:
                raise HyperParamsError("`n` must be 1 or more.")

    with pytest.raises(HyperParamsError, match="`n` must be 1 or more"):
        read_arguments(Strict, ["n=0"], command="try")
