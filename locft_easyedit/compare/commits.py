"""Edits that come in commits."""

from itertools import pairwise


def commits_of(n: int, stream: int | None) -> list[range]:
    """Returns the edits of each of `stream` commits among n, as equal in size as can be.

    Without a stream, `None`, all are one commit.
    """
    stream = stream or 1
    ends = [n * i // stream for i in range(stream + 1)]
    return [range(*pair) for pair in pairwise(ends)]
