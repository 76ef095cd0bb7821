"""Progress bars: in a notebook its own ones, and none where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(
    iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any
) -> Any:
    """Returns tqdm's bar for where the program runs; a log file gets none.

    Args:
        iterable: What it goes through; `None` is told of every step with `update`.
        show: Whether a bar is wanted at all.
        options: tqdm's other ones.
    """
    from tqdm.auto import tqdm  # looks for a notebook, which takes its time

    return tqdm(iterable, disable=None if show else True, **options)
