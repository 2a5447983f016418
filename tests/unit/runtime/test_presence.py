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
