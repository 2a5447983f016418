"""The launchers of one run, one a node: they meet, check that they mean the same run, and end together.

Decides who may take part and when all have to stop. Node 0 keeps the store that they talk through, which
the ranks use later, and speaks for the run; the others follow. Knows nothing of ranks and plans beyond
their numbers: what runs, what a failure means, and whether it is tried again, others say.

    hello/I     who node I is
    order/A     how attempt A begins, from node 0, once it has heard everybody
    ready/I     that node I sees the same output folder; `go`: that all do
    ended/A/I   how the ranks of node I have ended in attempt A
    verdict     what node 0 makes of the run in the end; empty when all is well
    bye/I       node I has read the verdict: node 0 may take the store away
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from realloc import __version__
from realloc.errors import InputError, ReallocError, RunError
from realloc.files import write_text
from runtime.hosts import Host, this_host
from runtime.place import Place, commands
from runtime.presence import Presence, Trouble, hello_key, raise_alarm
from runtime.stores import LOOPBACK, connect, listen, wait_for

_T = TypeVar("_T")
TOKEN = ".node-token"
TOKEN_WAIT_S = 10.0
"""How long a file that another node has written may take to be seen on a shared file system."""
POLL_S = 0.05
_FAREWELL_S = 3.0


@dataclass(frozen=True)
class Order:
    """How an attempt begins: what node 0 alone has decided.

    `checkpoint`: its name, None: from the start. `options`: those of node 0 that all ranks must share.
    """

    checkpoint: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """How a node's ranks have ended; all is well with neither a failure nor a reason.

    `failure`: of this node's own ranks, as JSON can say it. `reason`: why its launcher has stopped them.
    """

    node: int
    failure: Mapping[str, Any] | None = None
    reason: str | None = None


class Team:
    """This launcher among the others. A context manager: leaving it by an error ends the others' run too."""

    def __init__(self, place: Place) -> None:
        """Node 0 begins to listen, the others look for it. Raises InputError when that fails in time."""
        self._place = place
        self.node, self.nnodes = place.node, place.nnodes
        self._timeout = timedelta(seconds=place.join_timeout_s)
        host, port = place.endpoint or (LOOPBACK, 0)
        if self.is_first:
            self._store = _listen(place, host, port, self._timeout)
            port = self._store.port
        else:
            wait_for(host, port, place.join_timeout_s)
            self._store = connect(host, port, self._timeout)
        self.address = (host, port)
        """Where the run's store is."""
        self.me = this_host(place.node, host)
        self.hosts: tuple[Host, ...] = (self.me,)
        """By node, on node 0 after `meet`; elsewhere this one alone."""
        self._attempt = 0
        self._presence: Presence | None = None
        self._has_verdict = False

    @property
    def is_first(self) -> bool:
        return self.node == 0

    # meeting --------------------------------------------------------------------------------------

    def meet(self, plan_hash: str) -> None:
        """Tells node 0 who this is; node 0 returns when it has heard everybody.

        Raises InputError when somebody is missing, comes twice, means another run or cannot take part.
        """
        if self.nnodes == 1:
            return
        own = connect(*self.address, self._timeout)
        others = self._others() if self.is_first else ()
        self._presence = Presence(own, self.node, others, self._place.lost_s)
        self._hello(plan_hash)
        if self.is_first:
            self.hosts = (self.me, *(self._welcome(node, plan_hash) for node in self._others()))

    def _hello(self, plan_hash: str) -> None:
        mine = {"nnodes": self.nnodes, "versions": _versions(), "plan": plan_hash}
        text = json.dumps({"host": asdict(self.me), "mark": secrets.token_hex(8), **mine})
        found = self._ask(lambda: self._store.compare_set(hello_key(self.node), "", text)).decode()
        if found != text:
            other = Host(**json.loads(found)["host"])
            message = (
                f"--node-rank {self.node} is given twice, on {other.name} ({other.address}) and on "
                f"{self.me.name} ({self.me.address}); number the nodes from 0 to {self.nnodes - 1}."
            )
            self._alarm(message)
            raise InputError(message)

    def _welcome(self, node: int, plan_hash: str) -> Host:
        """The host of a node that has come. Raises InputError when it may not take part."""
        hello = self._await_hello(node)
        host = Host(**hello["host"])
        if hello["nnodes"] != self.nnodes:
            raise InputError(
                f"{host}: was started with --nnodes {hello['nnodes']}, node 0 with {self.nnodes}."
            )
        if hello["versions"] != _versions():
            raise InputError(
                f"{host}: runs {hello['versions']}, node 0 {_versions()}; install the same everywhere."
            )
        if hello["plan"] != plan_hash:
            raise InputError(
                f"{host}: its plan differs from node 0's (SHA-256 {hello['plan'][:12]}, {plan_hash[:12]}); "
                f"give every node the same plan, models and data at the same paths, the same --iterations."
            )
        return host

    def _await_hello(self, node: int) -> Mapping[str, Any]:
        deadline = time.monotonic() + self._place.join_timeout_s
        waits = False
        while not self._store.check([hello_key(node)]):
            self._check_all_well(InputError)
            if time.monotonic() > deadline:
                missing = [n for n in self._others() if not self._store.check([hello_key(n)])]
                raise InputError(
                    f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self.nnodes} "
                    f"did not come to {self.where} within {self._place.join_timeout_s:.0f} s; "
                    f"{commands(self.nnodes, None)}"
                )
            if not waits:
                alone = f" ({self.me.address}, which this machine alone reaches)" if self.is_local else ""
                print(f"node 0 waits at {self.where}{alone} for the other nodes", flush=True)
                waits = True
            time.sleep(POLL_S)
        content: Mapping[str, Any] = json.loads(self._store.get(hello_key(node)))
        return content

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on loopback, as a host's own name often is."""
        return ip_address(self.me.address.partition("%")[0]).is_loopback

    @property
    def where(self) -> str:
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    # attempts -------------------------------------------------------------------------------------

    def give(self, attempt: int, order: Order, out: Path) -> None:
        """On node 0: has the others begin an attempt, the first one once they see the folder `out`."""
        if self.nnodes == 1:
            return
        self._begin(attempt)
        content = asdict(order)
        if not attempt:
            token = secrets.token_hex(16)
            write_text(out / TOKEN, token)
            content |= {"token": token, "out": str(out.absolute())}
        self._say(f"order/{attempt}", json.dumps(content))
        if not attempt:
            for node in self._others():
                self._hear((f"ready/{node}",), InputError)
            self._say("go", "")

    def take(self, attempt: int, out: Path) -> Order | None:
        """On another node: how the attempt begins; None when the run is over and all is well.

        Raises InputError when `out` is not node 0's folder, and when the run ends before it has begun,
        RunError when it ends by a failure.
        """
        kind = RunError if attempt else InputError
        self._begin(attempt)
        heard = self._hear((f"order/{attempt}", "verdict"), kind)
        if "verdict" in heard:
            self._has_verdict = True
            if heard["verdict"]:
                raise kind(heard["verdict"])
            return None
        content = json.loads(heard[f"order/{attempt}"])
        if not attempt:
            _check_token(out, content.pop("token"), content.pop("out"))
            self._say(f"ready/{self.node}", "")
            self._hear(("go",), InputError)
        return Order(**content)

    def reason_to_stop(self) -> str | None:
        """Why this node's ranks must stop: another node has failed, or is not there any more."""
        presence = self._presence
        if presence is None:
            return None
        if presence.trouble is not None and presence.trouble.node != self.node:
            return presence.trouble.text or f"node {presence.trouble.node} has failed"
        if presence.lost:
            return self._lost_text()
        return self._cut_off_text() if presence.is_cut_off else None

    def quiet(self) -> AbstractContextManager[None]:
        """While it lasts, no thread of this launcher is inside torch's store: ranks may be forked."""
        return nullcontext() if self._presence is None else self._presence.quiet()

    def end(self, report: Report) -> Sequence[Report]:
        """Tells how this node's ranks have ended; on node 0, returns how those of all nodes have.

        Raises RunError when a node is lost, or its launcher has ended.
        """
        if report.failure is not None:
            self._alarm("")
        if not self.is_first:
            self._say(f"ended/{self._attempt}/{self.node}", json.dumps(asdict(report)))
            return [report]
        keys = [f"ended/{self._attempt}/{node}" for node in self._others()]
        return [report, *(Report(**json.loads(self._hear((key,), RunError)[key])) for key in keys)]

    def conclude(self, verdict: str) -> None:
        """On node 0: tells the others how the run has ended; empty: all is well."""
        self._has_verdict = True
        self._say("verdict", verdict)

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        if self._presence is not None:
            self._presence.attempt = attempt

    # talking --------------------------------------------------------------------------------------

    def _others(self) -> range:
        return range(1, self.nnodes)

    def _alarm(self, text: str) -> None:
        self._ask(lambda: raise_alarm(self._store, self._attempt, Trouble(self.node, text)))

    def _say(self, key: str, text: str) -> None:
        self._ask(lambda: self._store.set(key, text))

    def _hear(self, keys: Sequence[str], error: type[ReallocError]) -> Mapping[str, str]:
        """What is said under one of these keys, however long it takes as long as all are there."""
        while True:
            for key in keys:
                if self._ask(partial(self._store.check, [key])):
                    return {key: self._ask(partial(self._store.get, key)).decode()}
            self._check_all_well(error)
            time.sleep(POLL_S)

    def _ask(self, question: Callable[[], _T]) -> _T:
        """The store's answer. Raises RunError when node 0 is gone: a cut link must not hold us up."""
        if self.is_first or self._presence is None:
            return question()
        answers: list[_T] = []

        def ask() -> None:
            with suppress(dist.DistError):
                answers.append(question())

        thread = threading.Thread(target=ask, name="question", daemon=True)
        thread.start()
        while thread.is_alive() and not self._presence.is_cut_off:
            thread.join(POLL_S)
        if not answers:
            raise RunError(self._cut_off_text())
        return answers[0]

    def _check_all_well(self, error: type[ReallocError]) -> None:
        """Raises the error when somebody has left with a word, RunError when without."""
        if self._presence is None:
            return
        trouble = self._presence.trouble
        if trouble is not None and trouble.text:
            raise error(trouble.text)
        if self._presence.lost:
            raise RunError(self._lost_text())
        if self._presence.is_cut_off:
            raise RunError(self._cut_off_text())

    def _lost_text(self) -> str:
        assert self._presence is not None, "there are other nodes"
        lost = sorted(self._presence.lost)
        names = ", ".join(str(self.hosts[n]) if n < len(self.hosts) else f"node {n}" for n in lost)
        return (
            f"{names}: nothing was heard of its launcher for {self._place.lost_s:.0f} s: it was killed, the "
            f"machine is down, or the network between is cut."
        )

    def _cut_off_text(self) -> str:
        return (
            f"node 0 at {self.where} does not answer any more: its launcher has ended, its machine is down, "
            f"or the network between is cut."
        )

    # leaving --------------------------------------------------------------------------------------

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.nnodes == 1:
            return
        try:
            if error is not None and not self._has_verdict:
                text = str(error)
                if not isinstance(error, RunError):  # which has named its place
                    text = f"{self.me}: {text if isinstance(error, ReallocError) else 'was interrupted'}"
                self._alarm(text)
                if self.is_first:
                    self.conclude(text)
            self._part()
        except (RunError, dist.DistError):
            pass  # node 0 is gone, which the error says or nobody needs to know
        finally:
            if self._presence is not None:
                self._presence.stop()

    def _part(self) -> None:
        """Node 0 takes the store away only when the others have read what they need."""
        if not self.is_first:
            self._say(f"bye/{self.node}", "")
            return
        deadline = time.monotonic() + _FAREWELL_S
        lost = frozenset[int]() if self._presence is None else self._presence.lost
        came = [node for node in self._others() if self._store.check([hello_key(node)])]
        waited_for = [f"bye/{node}" for node in came if node not in lost]
        while not all(self._store.check([key]) for key in waited_for) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _listen(place: Place, host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    try:
        return listen(host, port, timeout)
    except InputError as error:
        if place.endpoint is None:
            raise
        raise InputError(
            f"--rdzv-endpoint {error} Node 0 listens there: --node-rank 0 must run on that host."
        ) from None


def _versions() -> str:
    return f"realloc {__version__}, torch {torch.__version__}"


def _check_token(out: Path, token: str, theirs: str) -> None:
    """Raises InputError unless node 0 has written the token into this node's `out`."""
    deadline = time.monotonic() + TOKEN_WAIT_S
    while _token(out) != token:
        if time.monotonic() > deadline:
            raise InputError(
                f"{out.absolute()}: is not the folder that node 0 writes to ({theirs}): what node 0 has put "
                f"there is not seen here; give a folder on a file system that all nodes share."
            )
        time.sleep(POLL_S)


def _token(out: Path) -> str:
    try:
        return (out / TOKEN).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
