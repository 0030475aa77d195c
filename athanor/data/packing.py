"""Conversations packed into rows: the best fit for the longest first, no conversation split."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`, and the indices that are too long for any row.

    Best-fit decreasing; equal lengths keep their order, so the result depends on `lengths` alone.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # remaining space -> rows
    spaces: list[int] = []  # sorted keys of with_space
    too_long = [index for index, length in enumerate(lengths) if length > capacity]
    fitting = [index for index, length in enumerate(lengths) if 0 < length <= capacity]
    for index in sorted(fitting, key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(index)
        left = space - length
        if left:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(row)
    return rows, too_long
