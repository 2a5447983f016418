"""Networks between nodes by name, for built-in profiles: `h100-sxm@200gb` instead of its usual 400 Gb/s.

A measured profile knows its own network and takes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from cost_models.link import Link, read_link
from realloc.errors import InputError
from realloc.files import Reader, nearest, read_yaml


def fabrics() -> Mapping[str, Link]:
    """Name -> link between nodes."""
    with resources.as_file(resources.files("cost_models").joinpath("fabrics.yaml")) as path:
        reader = Reader(read_yaml(path), "fabrics.yaml")
    return {name: read_link(reader.child(name)) for name in reader.keys()}


def fabric(name: str, device: str) -> Link:
    """The fabric of a `device` that asks for it. Raises InputError."""
    known = fabrics()
    if name not in known:
        raise InputError(
            f"device '{device}': no such fabric '{name}'.{nearest(name, known)} Known: {', '.join(known)}."
        )
    return known[name]
