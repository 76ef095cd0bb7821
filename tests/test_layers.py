"""Imports run one way through the package's rooms, lazily imported names included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import locft_easyedit

PACKAGE = Path(locft_easyedit.__file__).parent
# A room may import what stands in lines above it; rooms of one line know nothing of each other.
LAYERS = [
    ["errors"],
    ["utils"],
    ["hparams_rules"],
    ["hparams_spellings"],
    ["hparams"],
    ["distributed"],
    ["data"],
    ["modeling"],
    ["prefix"],
    ["training"],
    ["evaluation", "plan"],
    ["delta"],
    ["locate"],
    ["ledger"],
    ["api"],
    ["easyedit"],
    ["import_hook"],
    ["compare"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FACADE = "__init__"  # the package's own file only says where the public names are


def module_name(file: Path) -> str:
    """Returns a module's name within the package: `data.requests`, `data` for its `__init__`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == FACADE else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, source: str) -> set[str]:
    """Returns the package's modules that a module imports, at its top, within or for types."""
    file = MODULES[name]
    package = [*file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = []
            else:
                continue
            tail = (node.module or "").split(".") if node.module else []
            tail = tail if node.level else tail[1:]
            target = ".".join([*base, *tail])
            for alias in node.names:
                within = f"{target}.{alias.name}".strip(".")
                found.add(within if within in MODULES else target)
        elif isinstance(node, ast.Import):
            found.update(
                alias.name.partition(".")[2]
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE.name}.")
            )
    return found


GRAPH = {
    name: imported(name, file.read_text(encoding="utf-8"))
    for name, file in MODULES.items()
    if name != FACADE
}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_a_room():
    assert {room(module) for module in GRAPH} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_run_one_way(name):
    upward = [
        other
        for other in GRAPH[name]
        if room(other) != room(name) and LEVEL[room(other)] >= LEVEL[room(name)]
    ]
    assert not upward, f"{name} must not import {', '.join(upward)}"


def test_no_circle_between_modules():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("utils.files", "from ..training import loop", "training.loop"),
        ("utils.files", "def f():\n    from ..api import edit_model", "api"),
        ("data.forms", "from ..errors import LocFTError", "errors"),
        ("api", "import locft_easyedit.cli.edit", "cli.edit"),
        ("api", "if TYPE_CHECKING:\n    from .cli.edit import main", "cli.edit"),
        ("api", "from locft_easyedit.cli import edit", "cli.edit"),
    ],
)
def test_imports_are_found(name, source, expected):
    assert imported(name, source) == {expected}
