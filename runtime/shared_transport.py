"""Copies between ranks of one host, straight out of the sender's tensors.

Decides which copies of a schedule can go this way and when they may: the reader waits until the
sender says that its tensors are ready, and the sender waits until the reader has read. Both words
are messages of eight bytes, so a dead peer shows as with any other message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realloc.reallocation import Copy
from runtime.shared_memory import Place, SharedMemory, host_token

Views = Callable[[Copy], torch.Tensor]
"""The part of this rank's tensors that a copy reads, or writes."""
_MAX_DIMS = 3
_FIELDS = 4 + _MAX_DIMS
_OFFER, _ANSWER, _READY, _DONE = 11, 12, 13, 14  # message tags, apart from those of the data


@dataclass(frozen=True)
class Ends:
    """The copies between ranks of which this one is the sender, the receiver."""

    outgoing: Mapping[int, Sequence[Copy]]
    incoming: Mapping[int, Sequence[Copy]]


class SharedTransport:
    """The copies of one reallocation that go through shared memory.

    Made by all ranks of the reallocation at the same time. `taken` are the copies that go this
    way, in both directions; all others are left to messages.
    """

    def __init__(
        self,
        ends: Ends,
        source: Views,
        target: Views,
        dtypes: tuple[torch.dtype, torch.dtype],
        memory: SharedMemory,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._group, self._memory, self._dtypes = group, memory, dtypes
        offers = {peer: self._offer(copies, source) for peer, copies in ends.outgoing.items()}
        seen = {
            peer: torch.empty(2 + len(copies) * _FIELDS, dtype=torch.int64)
            for peer, copies in ends.incoming.items()
        }
        self._exchange(offers, seen, _OFFER)
        reads = {peer: self._read(seen[peer], copies) for peer, copies in ends.incoming.items()}
        answers = {
            peer: torch.tensor([view is not None for view in views], dtype=torch.int64)
            for peer, views in reads.items()
        }
        heard = {peer: torch.empty(len(c), dtype=torch.int64) for peer, c in ends.outgoing.items()}
        self._exchange(answers, heard, _ANSWER)
        self.taken: set[Copy] = set()
        self._readers: list[set[int]] = [set(), set()]
        for peer, copies in ends.outgoing.items():
            given = [copy for copy, yes in zip(copies, heard[peer].tolist(), strict=True) if yes]
            self.taken.update(given)
            for copy in given:
                self._readers[copy.relay].add(peer)
        self._reads: list[dict[int, list[tuple[torch.Tensor, torch.Tensor]]]] = [{}, {}]
        for peer, copies in ends.incoming.items():
            for copy, view in zip(copies, reads[peer], strict=True):
                if view is not None:
                    self.taken.add(copy)
                    self._reads[copy.relay].setdefault(peer, []).append((target(copy), view))
        self._word = torch.zeros(1, dtype=torch.int64)
        self._pending: list[dist.Work] = []

    def announce(self, relay: bool) -> None:
        """Tells the readers that they may read: what is sent at first, or what is relayed."""
        for peer in sorted(self._readers[relay]):
            self._pending.append(self._send(self._word, peer, _READY + 2 * relay))

    def read(self, relay: bool) -> None:
        """Copies everything that this rank reads, as its senders get ready."""
        words = {peer: torch.empty(1, dtype=torch.int64) for peer in self._reads[relay]}
        waits = [(peer, self._receive(word, peer, _READY + 2 * relay)) for peer, word in words.items()]
        for peer, wait in waits:
            wait.wait()
            for target, view in self._reads[relay][peer]:
                target.copy_(view)
            self._pending.append(self._send(self._word, peer, _DONE + 2 * relay))

    def finish(self) -> None:
        """Waits until all readers have read: after this the tensors may change."""
        words = []
        for relay in (False, True):
            for peer in sorted(self._readers[relay]):
                words.append(torch.empty(1, dtype=torch.int64))
                self._pending.append(self._receive(words[-1], peer, _DONE + 2 * relay))
        for work in self._pending:
            work.wait()
        self._pending = []

    def _offer(self, copies: Sequence[Copy], source: Views) -> torch.Tensor:
        """Host and process, then for every copy where its source lies (file -1: nowhere)."""
        fields = [host_token(), os.getpid()]
        for copy in copies:
            view = source(copy)
            place = self._memory.find(view) if view.dim() <= _MAX_DIMS else None
            if place is None:
                fields += [-1] * _FIELDS
            else:
                strides = [*view.stride(), *[0] * (_MAX_DIMS - view.dim())]
                fields += [place.fd, place.inode, place.num_bytes, place.offset, *strides]
        return torch.tensor(fields, dtype=torch.int64)

    def _read(self, offer: torch.Tensor, copies: Sequence[Copy]) -> list[torch.Tensor | None]:
        """The sender's tensors, where this process can see them."""
        token, pid, *fields = offer.tolist()
        if token == 0 or token != host_token():
            return [None] * len(copies)
        views: list[torch.Tensor | None] = []
        for i, copy in enumerate(copies):
            fd, inode, num_bytes, offset, *strides = fields[i * _FIELDS : (i + 1) * _FIELDS]
            segment = None if fd < 0 else self._memory.open(pid, Place(fd, inode, num_bytes, offset))
            if segment is None:
                views.append(None)
                continue
            dtype = self._dtypes[copy.relay]
            shape = copy.box.shape
            flat = segment[offset % dtype.itemsize :]
            flat = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            views.append(flat.as_strided(shape, strides[: len(shape)], offset // dtype.itemsize))
        return views

    def _exchange(self, out: Mapping[int, torch.Tensor], into: Mapping[int, torch.Tensor], tag: int) -> None:
        works = [self._receive(tensor, peer, tag) for peer, tensor in into.items()]
        works += [self._send(tensor, peer, tag) for peer, tensor in out.items()]
        for work in works:
            work.wait()

    def _send(self, tensor: torch.Tensor, peer: int, tag: int) -> dist.Work:
        work = dist.isend(tensor, peer, group=self._group, tag=tag)
        assert work is not None, "this rank is of the group"
        return work

    def _receive(self, tensor: torch.Tensor, peer: int, tag: int) -> dist.Work:
        work = dist.irecv(tensor, peer, group=self._group, tag=tag)
        assert work is not None, "this rank is of the group"
        return work
