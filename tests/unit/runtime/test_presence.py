"""Who counts as lost: a launcher that has come and is silent, whether or not it was ever heard."""

from __future__ import annotations

import time

import torch.distributed as dist

from runtime.presence import Presence, hello_key


def test_a_launcher_that_is_cut_off_before_its_first_beat_is_lost() -> None:
    store = dist.HashStore()
    store.set(hello_key(1), "come")  # node 2 has not come: it is waited for elsewhere
    presence = Presence(store, 0, (1, 2), lost_s=0.3)
    end = time.monotonic() + 20
    while not presence.lost and time.monotonic() < end:
        time.sleep(0.05)
    presence.stop()
    assert presence.lost == {1}


class Slow(dist.Store):
    """A store whose caller stays inside it for a while, and counts how many do."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.turns = 0, 0

    def set(self, key: str, value: str) -> None:
        self.inside += 1
        time.sleep(0.02)
        self.inside -= 1
        self.turns += 1

    def check(self, keys: list[str]) -> bool:
        return False


def test_nobody_is_inside_the_store_while_ranks_are_forked() -> None:
    store = Slow()
    presence = Presence(store, 0, (), lost_s=0.12)
    for _ in range(10):
        with presence.quiet():
            before = store.turns
            assert not store.inside
            time.sleep(0.03)
            assert not store.inside
            assert store.turns == before
        time.sleep(0.015)
    presence.stop()
    assert store.turns > 1
