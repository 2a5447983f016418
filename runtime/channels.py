"""Messages between two ranks outside of batches: which of them wait for each other.

gloo finds the message that a receive asks for by sender and tag. NCCL knows no tags: between two ranks
of one communicator operations run one after the other in the order of their issue, so that two ranks
that each send before they receive may wait forever. Here every kind of message has a channel of its
own in each direction, on NCCL a process group: what goes through one is received in the order in which
it is sent, and waits for nothing else. `tests/rendezvous.py` proves of recorded messages that this is
enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist


class Channel(IntEnum):
    """Kinds of messages; those of one kind and direction are received in the order of their sending.

    Hidden states and, while generating, prompts go FORWARD; gradients and sampled tokens BACKWARD.
    """

    FORWARD = 0
    BACKWARD = 1


@dataclass(frozen=True)
class Channels:
    """`groups`: one of all ranks for each channel and direction, or none where tags do."""

    groups: tuple[dist.ProcessGroup, ...] = ()

    def send(self, tensor: torch.Tensor, rank: int, channel: Channel) -> dist.Work:
        """Begins to send a contiguous tensor, which must stay as it is until the work is waited for."""
        upwards = dist.get_rank() < rank
        work = dist.isend(tensor, rank, group=self._group(channel, upwards), tag=int(channel))
        assert work is not None, "this rank is of the group"
        if not self.groups:
            os.sched_yield()  # to the socket's thread, which may not have heard yet that the receiver asks
        return work

    def receive(self, buffer: torch.Tensor, rank: int, channel: Channel) -> torch.Tensor:
        """Fills the buffer with the next message of the channel from that rank."""
        upwards = rank < dist.get_rank()
        dist.recv(buffer, rank, group=self._group(channel, upwards), tag=int(channel))
        return buffer

    def to_come(
        self, make: Callable[[], torch.Tensor], rank: int, channel: Channel
    ) -> Callable[[], torch.Tensor]:
        """`receive` into what `make` gives, once it is called: best made as soon as a message is known of.

        gloo sends nothing before the receiver has asked, and a sender that has gone on computing learns of it
        only when its socket's thread gets the core, up to a scheduler's tick later (4 ms at 250 Hz). So there
        the receiver asks at once, and the sender gives that thread its turn. NCCL's receive would wait on the
        device meanwhile, and hold a part of it.
        """
        if self.groups:
            return lambda: self.receive(make(), rank, channel)
        buffer = make()
        work = dist.irecv(buffer, rank, tag=int(channel))
        assert work is not None, "this rank is of the group"

        def received() -> torch.Tensor:
            wait_for(work)
            return buffer

        return received

    def _group(self, channel: Channel, upwards: bool) -> dist.ProcessGroup | None:
        return self.groups[2 * channel + upwards] if self.groups else None


def wait_for(work: dist.Work) -> None:
    """Waits for a message that was asked for: by this name it is found by who measures how long."""
    work.wait()


def make_channels(timeout: timedelta) -> Channels:
    """The channels of all ranks, which must all call it at the same place."""
    if "nccl" not in dist.get_backend_config():
        return Channels()
    # communicators between two ranks are made when they first meet
    return Channels(tuple(dist.new_group(backend="nccl", timeout=timeout) for _ in range(2 * len(Channel))))
