"""Damage to files: to their bytes, and to what they say. Every choice comes from the generator given."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

BOMB = "&a0 [x]\n" + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
CHUNKS: tuple[bytes, ...] = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3\x28",
    b"\t",
    b"\r",
    b": ",
    b"- ",
    b"[" * 200,
    b"{" * 100_000,
    b"!!python/object/apply:os.system [touch outside]",
    b"!!binary aGk=",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"? ",
    b"|\n",
    b"'",
    b'"',
    b"%YAML 9.9\n---\n",
    b"\n---\n",
    b"9" * 5000,
    b"x" * 200_000,
    b"1e999",
    BOMB.encode(),
    "\u2028\u0085\U0001f600".encode(),
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 100_000, 10**9),
)
WORDS = (
    *("", " ", "a", "ppo", "grpo", "sft", "dpo", "os:system", "posix:abort", "llama-7b", "mixtral-8x7b"),
    *(
        "../../outside/escaped",
        "/proc/self/mem",
        "..",
        "/",
        "~",
        "~nobody/x",
        "a/b",
        "a\0b",
        "con:",
        "x" * 100_000,
    ),
    *("../outside", ".", "-o", "--help", "$HOME", "%s%s%n", "{}", "node[0-99]", "node0:gpu[0-3]", "node[1]"),
    *("d4t1p1", "d0t0p0", "d1t1p1m9999999", "d2t1p1+zero3", "d1t2p2m4+sp+full", "h100-sxm", "cpu", "cpu@x"),
    *(
        "nan",
        "1e-5",
        "-inf",
        "null",
        "true",
        "é",
        "\u202e",
        "\ud800",
        "actor",
        "actor_gen",
        "experiment/1",
        "plan/2",
    ),
)
NESTED: tuple[Any, ...] = (
    [],
    {},
    [None],
    [[]],
    {"": {}},
    {"a": 1},
    {1: 2},
    [1, "a"],
    {"mean": 1, "max": 2},
    None,
    True,
)


def damaged(content: bytes, random: Random) -> bytes:
    """The file with its bytes or its structure damaged in one to three places."""
    if random.random() < 0.3:
        for _ in range(random.randint(1, 3)):
            content = _bytes(content, random)
        return content
    change = _lines if content.startswith(b'{"') and b"\n{" in content else _structure
    return change(content, random)


def _bytes(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    until = min(len(content), at + random.choice((0, 1, 1, 8, 200, 10_000)))
    what = random.randrange(4)
    if what == 0:
        return content[:at] + random.choice(CHUNKS) + content[until:]
    if what == 1:
        return content[:at]
    if what == 2:
        return content[:until] + content[at:until] + content[until:]
    return content[:at] + bytes(random.randrange(256) for _ in range(min(3, until - at))) + content[until:]


def _structure(content: bytes, random: Random) -> bytes:
    is_json = content.startswith(b"{")
    tree = json.loads(content) if is_json else yaml.safe_load(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _changed(tree, random)
    if is_json:
        return json.dumps(tree, default=str).encode("utf-8", "surrogatepass")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _lines(content: bytes, random: Random) -> bytes:
    lines = content.splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(lines))
        what = random.randrange(5)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[random.randrange(len(lines))])
        else:
            try:
                tree = _changed(json.loads(lines[at]), random)
            except ValueError:
                continue  # damaged already
            lines[at] = json.dumps(tree, default=str).encode("utf-8", "surrogatepass")
        if not lines:
            return b""
    return b"\n".join(lines) + b"\n"


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of the tree is."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree[:50]))
    for key, value in items:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _changed(tree: Any, random: Random) -> Any:
    """A copy of the tree with one thing changed: a value, a key, or where it is."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return random.choice(NESTED)
    at = random.choice(places)
    parent = _follow(tree, at[:-1])
    old = parent[at[-1]]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: random.choice(NUMBERS),
        lambda: random.choice(WORDS),
        lambda: random.choice(NESTED),
        lambda: _follow(tree, random.choice(places)),
        lambda: _scaled(old, random),
        lambda: _scaled(old, random),
    )
    what = random.randrange(10)
    if what == 0:
        del parent[at[-1]]
    elif what == 1 and isinstance(parent, dict):
        parent[random.choice(WORDS)] = parent.pop(at[-1])
    elif what == 2:
        deep: Any = old
        for _ in range(random.choice((3, 45, 80))):
            deep = [deep] if random.random() < 0.5 else {"a": deep}
        parent[at[-1]] = deep
    else:
        parent[at[-1]] = copy.deepcopy(random.choice(changes)())
    return tree


def _scaled(old: Any, random: Random) -> Any:
    """A value of the same type that may still pass: what lies behind the first checks is reached by it."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return random.choice((old + 1, old - 1, old * 2, old * 1000, -old, old * 0.5, int(old / 3)))
    if isinstance(old, str):
        return random.choice((old * 2, old[:-1], old + "x", old.upper(), "../" + old, old.replace("1", "2")))
    if isinstance(old, list):
        return random.choice((old[::-1], old[1:], old * 2, old[:1]))
    return old


def _follow(tree: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        tree = tree[key]
    return tree
