"""Stand-ins for packages that EasyEdit imports but that editing text does not need.

EasyEdit imports its multimodal and API parts, and so their packages, whatever is edited. While
`standing_in` is active, an import statement in EasyEdit (or in a script) that asks for such a
package and cannot have it gets a `StandIn`, which does no harm until something uses it.

Import statements are answered, not `sys.modules` filled: no other library ever sees a stand-in,
and checks such as transformers' `is_torchvision_available` keep telling the truth.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import MissingDependencyError

# Import name -> what to install. Neither the evaluation of text nor FT, ROME, MEMIT, AlphaEdit,
# LoRA, WISE, GRACE, MEND and UltraEdit use any of them, but for the three that say so.
STAND_INS: Mapping[str, str] = {
    "av": "av",
    "cv2": "opencv-python",
    "datasets": "datasets",  # ROME and relatives, to count key covariances that no file holds
    "einops": "einops",
    "fairscale": "fairscale",
    "iopath": "iopath",
    "matplotlib": "matplotlib",
    "openai": "openai",  # `evaluation_type: LLM-judge`
    "pandas": "pandas",
    "PIL": "pillow",
    "qwen_vl_utils": "qwen-vl-utils",
    "rouge": "rouge",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",  # GRACE, for the F1 score that only its evaluation has
    "timm": "timm",
    "torchvision": "torchvision",
    "zhipuai": "zhipuai",
}


@dataclass
class _Missing:
    """One failed import.

    Attributes:
        message: What the user reads when a stand-in for it is used.
        lenient: Whether calls are let through, as decorators are called during an import.
    """

    message: str
    lenient: bool


class StandIn:
    """Takes the place of a module, class or function that cannot be imported.

    Attributes can be read, and classes derived from it; to call it, or to make an instance of a
    derived class, raises `MissingDependencyError`.
    """

    def __init__(self, name: str, missing: _Missing):
        self._name = name
        self._missing = missing

    def _raise(self, *_: Any, **__: Any) -> NoReturn:
        raise MissingDependencyError(self._missing.message)

    def __getattr__(self, name: str) -> StandIn:
        # A special name is asked for to learn what kind of object this is: none.
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}", self._missing)

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        """Raises; while EasyEdit is imported, returns what a decorator may put in place."""
        if not self._missing.lenient:
            self._raise()
        return StandIn(f"{self._name}()", self._missing)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (type(self._name.rpartition(".")[2], (), {"__new__": self._raise}),)

    # Annotations such as `av.Frame[int]` and `av.Frame | None` are evaluated at import.
    def __getitem__(self, _: Any) -> StandIn:
        return self

    __or__ = __ror__ = __getitem__

    # No object is an instance of a class that is not there.
    def __instancecheck__(self, _: Any) -> bool:
        return False

    __subclasscheck__ = __instancecheck__

    # Without it, `__getitem__` would make every loop over a stand-in endless.
    def __iter__(self) -> Iterator[Any]:
        self._raise()

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"


class _Importing:
    """Answers import statements in place of `builtins.__import__`."""

    def __init__(self, names: Collection[str], importers: Sequence[str], lenient: bool):
        self.real_import = builtins.__import__
        self.names = frozenset(names)
        self.importers = tuple(importers)
        self.lenient = lenient
        self.missing: list[_Missing] = []
        self.failed: dict[str, _Missing] = {}

    def __call__(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        root = name.partition(".")[0]
        if level or not self._answers(str((globals or {}).get("__name__", "")), root):
            return self.real_import(name, globals, locals, fromlist, level)
        missing = self.failed.get(root)
        if missing is None:
            try:
                module = self.real_import(name, globals, locals, fromlist, level)
                absent = [part for part in fromlist or () if not hasattr(module, part)]
                if not absent or absent == ["*"]:
                    return module
                raise ImportError(f"{name} has no {', '.join(absent)}")
            except Exception as error:  # a torchvision built for another torch: RuntimeError
                missing = _Missing(_message(root, error), self.lenient)
                self.missing.append(missing)
                # Not tried again: C extensions dislike a second import after a failed one.
                if root not in sys.modules:
                    self.failed[root] = missing
        # `import a.b` binds a, `from a.b import c` reads c of a.b.
        return StandIn(name if fromlist else root, missing)

    def _answers(self, importer: str, root: str) -> bool:
        if root == "transformers":
            # It removes what parts of EasyEdit ask for: version 5 did with names that its copy of
            # BLIP-2 imports, and 5.24 with a module that UnKE imports.
            return _is_within(importer, "easyeditor")
        return root in self.names and any(_is_within(importer, place) for place in self.importers)


def _is_within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def _message(root: str, error: Exception) -> str:
    install = f"pip install {STAND_INS.get(root, root)}"
    if sys.modules.get(root) is None and importlib.util.find_spec(root) is None:
        return f"easyeditor needs '{root}' for this; it is not installed. Install it: {install}"
    return (
        f"easyeditor needs '{root}' for this; the one installed cannot be used "
        f"({type(error).__name__}: {error}). Install another version: {install}==VERSION"
    )


@contextmanager
def standing_in(
    names: Collection[str] = tuple(STAND_INS),
    importers: Sequence[str] = ("__main__", "easyeditor"),
    *,
    lenient: bool = False,
) -> Iterator[None]:
    """Gives stand-ins to import statements that ask for one of `names` and fail.

    A package that is installed and can be imported is always used for real. Only the modules
    named in `importers`, and those below them, are given stand-ins.

    Args:
        names: Import names of top-level packages.
        importers: Modules or packages whose import statements are answered.
        lenient: Let stand-ins be called until the context ends, as decorators are.
    """
    importing = _Importing(names, importers, lenient)
    builtins.__import__ = importing
    try:
        yield
    finally:
        builtins.__import__ = importing.real_import
        for missing in importing.missing:
            missing.lenient = False
