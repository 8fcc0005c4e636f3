"""Task: a worker process: a gateway that gets its sockets from the parent, and works with the other workers as one."""

import logging
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from fxgateway.app import Gateway
from fxgateway.certificates import Certificates, load_certificates
from fxgateway.doors.door import DoorRelays
from fxgateway.routing.admission import Admission, AdmissionLimits
from fxgateway.routing.shared_admission import SharedAdmission
from fxgateway.sandbox import Sandbox
from fxgateway.settings import GatewaySettings
from fxgateway.tunnels.peer_processes import PeerProcesses
from fxgateway.workers.channel import Inbox, Message
from fxgateway.workers.parent_line import ParentLine
from fxgateway.workers.peering import WorkerParts, WorkerPeering
from fxgateway.workers.peers import Peers
from fxgateway.workers.relay_dispatch import RelayDispatch
from fxgateway.workers.shares import from_message, share_of
from fxgateway.workers.snapshot import snapshot
from fxgateway.workers.worker_relays import AllRelays
from fxtunnel.engine.reactor import Reactor
from fxtunnel.errors import ConfigError, FxError, leaves
from fxtunnel.kit import logs
from fxtunnel.kit.listeners import LINE_NAME, Inherited
from fxtunnel.kit.notify import Notifier
from fxtunnel.kit.process import keep_going, let_finish, raise_file_limit, wait_until
from fxtunnel.kit.settings import Address
from fxtunnel.protocol.alpn import spoken_by

logger = logging.getLogger(__name__)

BEGIN_S: Final = 30.0
"""For the parent's first message, on a machine that has just started and is busy."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the parent's first message makes of this process: worker `number` of `of`, called `process` by relays that come back to it."""

    number: int
    of: int
    process: str
    sockets: dict[str, socket.socket]
    """The worker's now: listening sockets, by the addresses that the configuration knows them by; lines, by what they are kept under."""


def main() -> None:
    """Run a worker. The command's only argument is the descriptor of its line to the parent. Returns when the worker has drained."""
    logs.configure("info", "auto", sys.stderr)  # until the parent has said how
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    try:
        run(sock, *hear_begin(sock))
    except* FxError as group:
        for exc in leaves(group):
            for problem in exc.problems if isinstance(exc, ConfigError) else (exc,):
                logger.error("this worker ends: %s", problem)
        sys.exit(1)


def hear_begin(sock: socket.socket) -> tuple[Message, dict[str, socket.socket]]:
    """Wait for the parent's first message and the sockets that come with it: to listen on, and lines. Blocks; later messages stay unread.

    Raises:
        FxError: the parent is gone, says nothing for BEGIN_S, or says something that this version does not know.
    """
    inbox, sockets = Inbox(sock), dict[str, socket.socket]()
    sock.settimeout(BEGIN_S)
    while True:
        try:
            received = inbox.read()
        except TimeoutError as exc:
            raise FxError(f"the parent process has said nothing for {BEGIN_S:g} s") from exc
        except OSError as exc:
            raise FxError(f"the parent process cannot be heard: {exc.strerror}") from exc
        match received:
            case None:
                pass
            case {"op": "sockets", "addresses": addresses}, some:
                sockets |= dict(zip(addresses, some, strict=False))
            case {"op": "begin"} as message, _:
                sock.setblocking(False)
                return message, sockets
            case message, _:
                raise FxError(f"the parent process begins with {message.get('op')!r}, which this one does not know")


def run(sock: socket.socket, begin: Message, sockets: dict[str, socket.socket]) -> None:
    """Run the worker that the parent's first message describes. Blocks until it has drained.

    Raises:
        FxError: it cannot work here; alone, or in a group.
    """
    config_path = Path(begin["config"])
    assignment = Assignment(int(begin["worker"]), int(begin["of"]), begin["process"], sockets)
    settings = from_message(begin["settings"], config_path.parent)
    _mark_logs(assignment.number)
    logs.configure(settings.log.level, settings.log.style, sys.stderr)
    sandbox = Sandbox(settings, config_path)
    sandbox.enter("")  # while there is one thread only; service managers hear of the parent
    reactor = Reactor()
    line = ParentLine(reactor, sock)
    worker = Worker(reactor, settings, config_path, sandbox, line, assignment)
    if begin["is_drained"]:
        worker.take_no_clients()
    try:
        reactor.host_trio(worker.serve)
    finally:
        line.close()
        reactor.close()


class Worker(Gateway):
    """A gateway that leaves listening, relay names and status pages to the parent."""

    def __init__(
        self, reactor: Reactor, settings: GatewaySettings, config_path: Path, sandbox: Sandbox, line: ParentLine, assignment: Assignment
    ) -> None:
        self._line = line
        self._assignment = assignment
        self._turn = trio.Event()
        self._departs = False
        """Whether a successor of the gateway has taken over what this process listened on."""
        self._lines = {name.removeprefix(LINE_NAME): sock for name, sock in assignment.sockets.items() if name.startswith(LINE_NAME)}
        self._sockets = {address: sock for address, sock in assignment.sockets.items() if not address.startswith(LINE_NAME)}
        self._prepared: tuple[GatewaySettings, Certificates, Inherited] | None = None
        super().__init__(reactor, share_of(settings, assignment.of), config_path, Notifier(), raise_file_limit(), sandbox)

    def take_no_clients(self) -> None:
        """Before `serve`: an administrator has drained the gateway."""
        self._view.note_drain()

    async def serve(self) -> None:
        """See `Gateway`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, "following the parent's orders", self._follow_orders)
            nursery.start_soon(self._end_with_parent, nursery.cancel_scope)
            await super().serve()
            nursery.cancel_scope.cancel()

    def _make_admission(self, settings: GatewaySettings) -> Admission:
        self._shared = SharedAdmission(self._admission_limits(settings), self._spare_files())
        return self._shared

    def _admission_limits(self, settings: GatewaySettings) -> AdmissionLimits:
        # Connections are counted over all workers, open files per worker: that limit is kept by `SharedAdmission.at_most_here`.
        in_all = max(1, min(settings.limits.connections, self._spare_files() * self._assignment.of))
        return replace(super()._admission_limits(settings), connections=in_all)

    def _make_relays(self) -> DoorRelays:
        self._peers = Peers(self._reactor, self._shared)
        self._all_relays = AllRelays(self._registry, self._peers.pass_on, self._peers.catch_up)
        return self._all_relays

    def _make_peer_processes(self) -> PeerProcesses:
        self._relay_dispatch = RelayDispatch(self._line, self._peers, self._registry, self._all_relays, self._assignment.number)
        return self._relay_dispatch

    def _process(self) -> str:
        return self._assignment.process

    def _make_inherited(self) -> Inherited:
        sockets, self._sockets = self._sockets, {}
        return Inherited(sockets)

    async def _follow_earlier(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Use the lines that the parent has given; it forgets those of processes that have ended."""
        lines, self._lines = self._lines, {}
        ours = lines.pop(self._assignment.process, None)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._relay_dispatch.lines.run, lines, ours, _leave_to_parent)
            nursery.start_soon(self._relay_dispatch.take_returning)
            task_status.started()

    async def _serve_pages(self, *, task_status: trio.TaskStatus[Address]) -> None:
        await trio.lowlevel.checkpoint()
        task_status.started(self._settings.admin.listen)

    async def _await_turn(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._line.channel.send({"op": "prepared"})
        await self._turn.wait()
        task_status.started()

    async def _tell_ready(self) -> None:
        await super()._tell_ready()
        self._line.channel.send({"op": "serves"})

    def _has_successor(self) -> bool:
        return self._departs

    async def _hand_over(self, drain_s: float) -> None:
        """The listening sockets have been closed already, by the order "let-go"."""
        await trio.lowlevel.checkpoint()
        self._registry.send_on(drain_s)

    async def _let_clients_finish(self, drain_s: float) -> None:
        """Wait until no worker has any: another worker's clients may use a relay that is connected here."""
        deadline = trio.current_time() + drain_s
        await let_finish("clients", lambda: self._doors.clients + self._peers.bridges, drain_s)
        with trio.move_on_at(deadline):
            await wait_until(lambda: not self._shared.connections)

    def _announce(self, tunnel: str, admin: str) -> None:
        self._view.listening = (tunnel, *self._doors.bound.values(), admin)
        parts = WorkerParts(
            self._registry,
            self._all_relays,
            self._shared,
            self._doors,
            self._relay_dispatch,
            lambda: snapshot(self._view, self._all_relays.far),
            self._steering.act,
        )
        WorkerPeering(self._reactor, self._line, self._peers, parts).begin()
        self._line.channel.send({"op": "ready"})

    async def _drain(self) -> None:
        await super()._drain()
        self._peers.end_bridges()

    async def _load_again(self) -> None:
        logger.info("SIGHUP is for the parent process, which reloads all workers")
        await trio.lowlevel.checkpoint()

    async def _end_with_parent(self, everything: trio.CancelScope) -> None:
        await self._line.orphaned.wait()
        logger.error("the parent process is gone; this worker stops")
        if not self._turn.is_set():
            everything.cancel()  # another gateway may serve at these addresses: accept nothing that should go there
        limits = self._settings.limits.model_copy(update={"drain_s": 0.0})
        self._settings = self._settings.model_copy(update={"limits": limits})
        self._stop.set()

    async def _follow_orders(self) -> None:
        async for message, received in self._line.received_orders:
            self._sockets |= dict(zip(message.get("addresses", ()), received, strict=False))
            match message["op"]:
                case "prepare":
                    sockets, self._sockets = self._sockets, {}
                    self._answer(message, await self._problems(message, Inherited(sockets)))
                case "commit":
                    self._commit()
                    self._answer(message, [])
                case "abandon":
                    await self._abandon()
                case "go":
                    self._turn.set()
                case "let-go":
                    await self._abandon()
                    self._doors.release()
                    self._port.stop_accepting()
                    self._relay_dispatch.stop_accepting()
                    self._line.channel.send({"op": "closed"})
                case "depart":
                    self._departs = True
                    self._stop.set()
                case "stop":
                    await self._abandon()
                    self._doors.close()
                    self._line.channel.send({"op": "closed"})
                    self._stop.set()

    def _answer(self, message: Message, problems: list[str]) -> None:
        self._line.channel.send({"op": "answer", "n": message["n"], "problems": problems})

    async def _problems(self, message: Message, inherited: Inherited) -> list[str]:
        """Prepare for a configuration; returns what is wrong with it."""
        try:
            await self._prepare(message, inherited)
        except ConfigError as exc:
            return [str(problem) for problem in exc.problems]
        except FxError as exc:
            return [str(exc)]
        except Exception as exc:
            logger.exception("a new configuration cannot be looked at")
            return [f"an internal error: {exc}"]
        return []

    async def _prepare(self, message: Message, inherited: Inherited) -> None:
        """Do everything that can fail in a reload, and keep the results for `_commit`."""
        await self._abandon()
        fresh = share_of(from_message(message["settings"], Path(message["config"]).parent), self._assignment.of)
        try:
            self._sandbox.check(fresh)
            certificates = await trio.to_thread.run_sync(load_certificates, fresh, spoken_by(self._name))
            await trio.to_thread.run_sync(self._access.open, fresh.log.access)
        except BaseException:
            inherited.close()
            raise
        self._prepared = fresh, certificates, inherited

    def _commit(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            fresh, certificates, inherited = prepared
            self._apply(fresh, certificates, inherited)
            inherited.close()
            logger.info("reloaded %s", self._config_path)

    async def _abandon(self) -> None:
        """Drop what was prepared: the reload does not happen."""
        await trio.lowlevel.checkpoint()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            fresh, _, inherited = prepared
            inherited.close()
            await self._move_access_log_back(fresh)


def _leave_to_parent(process: str) -> None:
    """The parent sees the end of an earlier process as well, and has it forgotten."""


def _mark_logs(number: int) -> None:
    """Have every log line say which worker it is from."""
    make = logging.getLogRecordFactory()

    def marked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.worker = number
        return record

    logging.setLogRecordFactory(marked)


if __name__ == "__main__":
    main()
