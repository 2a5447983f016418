"""Key-value stores that processes meet at, listening where they are told to and nowhere else.

Torch's own TCPStore listens on every interface whatever host it is given, and whoever reaches a store can
write to it. Here the socket is made first, bound to the one address, and handed over.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import psutil
import torch.distributed as dist

from realloc.errors import InputError

LOOPBACK = "127.0.0.1"
_TRY_S, _PAUSE_S = 2.0, 0.1


def listen(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A store that listens on that host's address only; port 0 takes a free one (`store.port`).

    Raises InputError when the address is not one of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(4096)
            found = int(listener.getsockname()[1])
            handle = os.dup(listener.fileno())  # the store closes its own
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{host}:{port}: cannot be listened on: {error}; give an address of this machine and a free port."
        ) from None
    return dist.TCPStore(
        str(address[0]),
        found,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=handle,
    )


def wait_for(host: str, port: int, timeout_s: float) -> None:
    """Returns once somebody listens there. Raises InputError when nobody does in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=min(_TRY_S, timeout_s)).close()
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{host}:{port}: nobody answers within {timeout_s:.0f} s ({error}); start node 0 on that "
                    f"host, see what it says, and check that this machine reaches it."
                ) from None
        time.sleep(_PAUSE_S)


def connect(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A connection to a store that listens elsewhere. Raises InputError when it does not answer in time."""
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{host}:{port}: nobody answers within {timeout.total_seconds():.0f} s: {reason}; start node 0 "
            f"first, and check that this host reaches it."
        ) from None


def address_towards(host: str) -> str:
    """The address that this machine has for that host: what the host itself would reach it by.

    Raises InputError when the name is not known or nothing leads there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks for the way
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise InputError(f"{host}: cannot be reached from this machine: {error}.") from None


def interface_towards(host: str) -> str:
    """The name of the network interface by which this machine reaches a host; loopback for itself.

    Raises InputError when the name is not known or nothing leads there.
    """
    own = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    raise InputError(f"{host}: is reached from {own}, an address of no interface of this machine.")
