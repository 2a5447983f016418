"""Candidates as rows of numbers, and what follows from rows alone: bytes and seconds on a GPU, cycles.

What search looks at most often, so plain tuples and loops.
"""

from __future__ import annotations

from collections.abc import Sequence

# seconds, first GPU, GPU after the last, mask, layout, single, resident key, parameters, other
# resident bytes, working bytes; with offload, when what a call keeps counts as working, its
# parameters (0 otherwise), which do so only where no other call keeps them resident
Row = tuple[float, int, int, int, int, int, int, int, int, int, int]


def load(rows: Sequence[Row], gpu: int) -> tuple[int, float]:
    """Peak bytes on a GPU, and the seconds that calls occupy it.

    With offload a lower bound of the bytes: at least what a call loads is there while it runs.
    """
    size = working = passing = 0
    busy = 0.0
    held = []
    for row in rows:
        if row[1] <= gpu < row[2]:
            busy += row[0]
            size += row[8]
            if row[10]:
                passing = 1
            elif row[6] not in held:
                held.append(row[6])
                size += row[7]
            working = max(working, row[9])
    if passing:
        for row in rows:
            if row[10] and row[1] <= gpu < row[2] and row[6] not in held:
                working = max(working, row[9] + row[10])
    return size + working, busy


def version_cycles(
    num_calls: int,
    edges: Sequence[tuple[int, int, tuple[str, ...]]],
    users: Sequence[tuple[int, int]],
    most: int = 32,
) -> tuple[tuple[int, ...], ...]:
    """Paths from a call to the train_step whose parameters it waits for in the next iteration.

    The calls of such a path run one after the other within one period. A call alone is a path too.
    At most `most` paths: leaving some out weakens bounds, nothing else.
    """
    successors: dict[int, list[int]] = {}
    for src, dst, _ in edges:
        successors.setdefault(src, []).append(dst)
    found: list[tuple[int, ...]] = [(i,) for i in range(num_calls)]
    for user, trainer in users:
        stack: list[tuple[int, ...]] = [(user,)]
        while stack and len(found) < num_calls + most:
            path = stack.pop()
            if path[-1] == trainer:
                found.append(path)
                continue
            stack += [(*path, after) for after in successors.get(path[-1], ()) if after not in path]
    # a path within a longer one says nothing more
    return tuple(p for p in found if not any(p != q and set(p) <= set(q) for q in found))


def call_order(
    num_calls: int, edges: Sequence[tuple[int, int, tuple[str, ...]]], users: Sequence[tuple[int, int]]
) -> list[int]:
    """Calls in an order that data edges and parameter versions allow, near the graph's own."""
    waits: dict[int, set[int]] = {i: set() for i in range(num_calls)}
    for src, dst, _ in edges:
        waits[dst].add(src)
    for user, trainer in users:
        waits[trainer].add(user)
    order: list[int] = []
    while waits:
        free = [i for i, before in waits.items() if not before & waits.keys()]
        assert free, "the graph was checked to be acyclic"
        order.append(free[0])
        del waits[free[0]]
    return order
