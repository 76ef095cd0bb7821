"""Registers LocFT-BF when EasyEdit is imported, whoever imports it.

Light: it is imported with the package, and asks for the rest when `easyeditor` is asked for.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
_NAME = "easyeditor"


class _Finder(MetaPathFinder):
    """Finds EasyEdit as `register` would, and lets it be registered with."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns EasyEdit's spec; `None` for all other modules, and while we load EasyEdit."""
        if fullname != _NAME:
            return None
        importing = importlib.import_module(".easyedit.importing", __package__)
        spec: ModuleSpec | None = importing.spec_for_statement()
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs EasyEdit's own loader the way `register` does, and registers LocFT-BF after it."""

    def __init__(self, real: Loader) -> None:
        self._real: Any = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns what the real loader makes."""
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Imports EasyEdit, and registers LocFT-BF; if that fails, EasyEdit is there without it."""
        importing = importlib.import_module(".easyedit.importing", __package__)
        with importing.importing(shield=True):
            self._real.exec_module(module)
        try:
            importlib.import_module(".easyedit", __package__).register()
        except (ImportError, AttributeError, ValueError) as error:
            logger.warning("LocFT-BF is not registered with this EasyEdit: %s", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def install() -> None:
    """Registers LocFT-BF if EasyEdit is imported, and else as soon as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    package = sys.modules.get(_NAME)
    # One that is being imported just now asks for us itself, and has no editors yet.
    if package is not None and not getattr(package.__spec__, "_initializing", False):
        importlib.import_module(".easyedit", __package__).register()
