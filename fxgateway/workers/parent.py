"""Task: the parent of the workers: it binds their sockets, keeps them alive and in step, and keeps what all of them must agree on."""

import logging
import os
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio

from fxgateway import settings as config
from fxgateway.access_log import AccessLog
from fxgateway.admin.pages import make_app
from fxgateway.app import door_configs
from fxgateway.check import verify_files
from fxgateway.sandbox import Sandbox
from fxgateway.settings import GatewaySettings
from fxgateway.steering import AdminPages
from fxgateway.workers.channel import Channel, Message, pair
from fxgateway.workers.child import Child, SpawnPayload
from fxgateway.workers.drain_requests import DrainRequests
from fxgateway.workers.pending_calls import NoAnswer, PendingCalls
from fxgateway.workers.reconnect_lines import ReconnectLines
from fxgateway.workers.relay_owners import RelayOwners
from fxgateway.workers.shared_listeners import SharedListeners
from fxgateway.workers.shares import as_message
from fxgateway.workers.snapshot import Facts, MergedView
from fxgateway.workers.two_phase_reload import TwoPhaseReload
from fxgateway.workers.worker_relays import holders
from fxtunnel.engine.reactor import Reactor
from fxtunnel.errors import ConfigError, FxError
from fxtunnel.kit import logs
from fxtunnel.kit.listeners import LINE_NAME, Inherited
from fxtunnel.kit.notify import LoopNotifier, Notifier
from fxtunnel.kit.process import Reloads, feed_watchdog, follow_launcher, raise_file_limit, say_ready, settle, wait_until, watch_signals
from fxtunnel.kit.settings import Address
from fxtunnel.model import InstanceId, RelayId, ServiceName

logger = logging.getLogger(__name__)

STATUS_S: Final = 1.0
"""For a worker to answer a status page; half of what commands wait for (console.ASK_TIMEOUT_S)."""
CLOSE_S: Final = 1.0
"""For all workers to close their doors; one that is stuck is not waited for."""
LET_GO_S: Final = 5.0
"""The same while a successor waits: half of what the launcher allows us (`RELEASE_S`). A worker that takes longer is killed."""
STOP_S: Final = 10.0
"""For the goodbyes of workers, beyond limits.drain_s."""


def run(settings: GatewaySettings, config_path: Path) -> int:
    """Run the gateway in `tunnel.workers` processes until it is told to stop; returns the exit code. Blocks.

    Raises:
        FxError: it cannot work here; alone, or in a group.
    """
    logs.configure(settings.log.level, settings.log.style, sys.stderr)
    raise_file_limit()
    notifier = LoopNotifier.of_this_process()
    Sandbox(settings, config_path).enter_above_workers(os.environ.get("NOTIFY_SOCKET", ""))  # while there is one thread only
    reactor = Reactor()
    try:
        reactor.host_trio(Parent(reactor, settings, config_path.absolute(), notifier).serve)
    finally:
        reactor.close()
        notifier.close()
    return 0


class Parent:
    """Implements `ChildOwner` for its children, and hears what they say."""

    def __init__(self, reactor: Reactor, settings: GatewaySettings, config_path: Path, notifier: Notifier) -> None:
        self.reactor = reactor
        self._settings = settings
        self._config_path = config_path
        self._notifier = notifier
        self._stop = trio.Event()
        self._reloads = Reloads()
        self._has_turn = False
        self._inherited = Inherited.from_environ(os.environ, os.getpid(), notifier)
        self._listeners = SharedListeners(self._inherited)
        self._reconnect_lines = ReconnectLines(self._inherited)
        self._children = {number: Child(number, self, self) for number in range(1, settings.tunnel.workers + 1)}
        self._calls = PendingCalls()
        self._has_started = False
        self._owners = RelayOwners(settings.limits.relays)
        self._drains = DrainRequests(self._children.values(), self._calls, self._take_no_clients)
        self._reload = TwoPhaseReload(self._children.values(), self._calls)
        self._facts = Facts(settings, self._wanted)
        self._view = MergedView(self._facts)
        steering = Address(path=settings.tunnel.steering_path)
        self._pages = AdminPages(make_app(self._view, self._look), settings.admin.listen, self._drains.steer, steering, self._inherited)

    async def serve(self) -> None:
        """Listen, start the workers, and return when they have ended after SIGTERM.

        Raises:
            FxError: an address cannot be listened on, or a worker does not start.
        """
        try:
            self._listeners.open(self._settings.tunnel.listen, [door.listen for door in self._settings.doors])
            async with trio.open_nursery() as nursery:
                await nursery.start(watch_signals, self._reloads.ask, self._stop.set)
                async with trio.open_nursery() as starting:
                    for child in self._children.values():
                        starting.start_soon(nursery.start, child.run)
                    for child in self._children.values():
                        await child.prepared.wait()
                    await nursery.start(follow_launcher, self._notifier, self._stop.set)
                    await nursery.start(self._reconnect_lines.run)
                    self._take_turn()
                self._has_started = True
                admin = await nursery.start(self._pages.run)
                self._inherited.close()
                nursery.start_soon(self._reloads.run, self._load_again, self._notifier)
                nursery.start_soon(feed_watchdog, self._notifier)
                self._announce(str(admin))
                nursery.start_soon(self._tell_ready)
                settle()
                await self._stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()
        finally:
            self._listeners.close()
            self._reconnect_lines.close()

    def payload(self, number: int) -> SpawnPayload:
        """See `ChildOwner`."""
        name = self._reconnect_lines.begin(number)
        begin = {"op": "begin", "worker": number, "of": len(self._children), "process": name.process, "config": str(self._config_path)}
        message = {**begin, "settings": as_message(self._settings), "is_drained": self._drains.is_drained}
        own = {} if name.line is None else {f"{LINE_NAME}{name.process}": name.line}
        return SpawnPayload(message, [*self._listeners.sockets(), *self._reconnect_lines.to_earlier()], own)

    def introduce(self, child: Child) -> None:
        """See `ChildOwner`: a line between it and each of the others."""
        self._facts.pids[child.number] = child.pid
        for other in self._children.values():
            if other is child or other.channel is None or child.channel is None:
                continue
            one, two = pair()
            for channel, number, end in ((child.channel, other.number, one), (other.channel, child.number, two)):
                if not channel.send({"op": "peer", "worker": number}, [end]):
                    end.close()

    def died(self, child: Child) -> None:
        """See `ChildOwner`."""
        self._owners.worker_gone(child.number)
        self._reconnect_lines.end(child.number)
        self._view.died(child.number)
        self._facts.pids.pop(child.number, None)
        if not self._stop.is_set():
            self._facts.restarts[child.number] += 1

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        """See `ChannelOwner`."""
        for sock in sockets:
            sock.close()
        child = self._children[channel.number]
        if child.channel is not channel:
            return  # the last message of a process that has been replaced
        child.beat()
        match message["op"]:
            case "prepared":
                child.prepared.set()
                if self._has_turn:
                    child.take_turn()
            case "ready":
                child.became_ready()
                self._drains.remind(child)
            case "serves":
                child.serves = True
            case "closed":
                child.has_closed = True
            case "answer":
                self._calls.answered(message)
            case "told":
                for relay_id, holder in holders(message["news"]):
                    if holder is None:
                        self._owners.gone(child.number, relay_id)
                    else:
                        self._owners.note(child.number, relay_id, *holder)
            case "place":
                self._place(channel, message)
            case "unplace":
                self._owners.unplace(child.number)
            case "claim":
                self._answer(channel, message, epoch=self._claim(child.number, message))

    def on_gone(self, channel: Channel) -> None:
        """See `ChannelOwner`: its process ends, or is about to."""
        self._calls.gone(channel)

    def _answer(self, channel: Channel, message: Message, **fields: Any) -> None:
        channel.send({"op": "answer", "n": message["n"], **fields})

    def _place(self, channel: Channel, message: Message) -> None:
        """Say which worker a connection belongs to: the one it names, if that serves. If not, a data link stays where it came in."""
        if message["named"] in self._candidates():
            self._answer(channel, message, worker=message["named"], counts=False)
        elif message["is_data"]:
            self._answer(channel, message, worker=channel.number, counts=False)
        else:
            worker = self._owners.place(self._candidates(), self.reactor.now)
            self._answer(channel, message, worker=worker or channel.number, counts=worker is not None)

    def _candidates(self) -> list[int]:
        """Workers that can get a new relay. While the gateway starts also those that are not ready yet: all relays come at once then, and
        would all end up at the worker that was ready first.
        """
        return [number for number, child in self._children.items() if child.is_ready or (child.pid and not self._has_started)]

    def _claim(self, worker: int, message: Message) -> int:
        """Grant the relay's name to this worker and fence its former holder off. Returns the epoch, 0 if there is no room."""
        relay_id, instance = RelayId(message["relay"]), InstanceId(message["instance"])
        granted = self._owners.claim(worker, relay_id, instance)
        if granted is None:
            return 0
        former = granted.former
        other = self._children[former.worker].channel if former is not None else None
        if former is not None and other is not None:
            facts = {"relay": relay_id, "instance": former.instance, "epoch": granted.epoch, "successor": instance}
            other.send({"op": "fence", **facts, "departure": message["departures"].get(former.instance)})
        return granted.epoch

    async def _look(self) -> None:
        """Ask all workers for their status. One that does not answer in time is shown as it was last seen."""
        found: dict[int, Message] = {}

        async def ask(child: Child) -> None:
            if child.channel is not None and child.is_ready:
                try:
                    found[child.number] = await self._calls.ask(child.channel, "status", STATUS_S)
                except NoAnswer as exc:
                    logger.warning("status: %s", exc)

        async with trio.open_nursery() as nursery:
            for child in self._children.values():
                nursery.start_soon(ask, child)
        self._view.heard({number: status for number, status in found.items() if self._children[number].is_ready})

    def _wanted(self) -> Mapping[str, frozenset[ServiceName]]:
        configs = door_configs(self._settings, {}, AccessLog())
        return {door.name: door.preread_router.services() if door.preread_router else frozenset({door.service}) for door in configs}

    def _announce(self, admin: str) -> None:
        bound = self._listeners.bound()
        self._facts.listening = (*bound.values(), admin)
        tunnel = bound[str(self._settings.tunnel.listen)]
        doors = ", ".join(f"{door.service or f'routes by {door.kind.value}'} on {bound[str(door.listen)]}" for door in self._settings.doors)
        count = len(self._children)
        say_ready(f"fxgateway ready: tunnels on {tunnel}; doors: {doors or 'none'}; admin on {admin}; {count} workers")

    def _take_turn(self) -> None:
        self._has_turn = True
        for child in self._children.values():
            child.take_turn()

    async def _tell_ready(self) -> None:
        """Report READY once every worker serves clients."""
        await wait_until(lambda: self._stop.is_set() or all(child.serves for child in self._children.values()))
        if not self._stop.is_set():
            self._notifier.ready()

    async def _drain(self) -> None:
        drain_s = self._settings.limits.drain_s
        self._facts.is_draining = True
        if self._inherited.is_handed_on:
            await self._hand_over()
        else:
            self._notifier.stopping()
            self._listeners.close_doors()
            self._listeners.close()
            for child in self._children.values():
                child.stop()
            with trio.move_on_after(CLOSE_S):  # the log line below promises that no client comes in any more
                await wait_until(self._have_closed)
        logger.info("stopping: %d workers have %g s for their clients", len(self._children), drain_s)
        with trio.move_on_after(drain_s + STOP_S):
            await wait_until(lambda: not any(child.pid for child in self._children.values()))

    def _have_closed(self) -> bool:
        return all(child.has_closed or not child.is_ready for child in self._children.values())

    async def _hand_over(self) -> None:
        """Close everything that the successor listens on, then send relays there.

        In that order: a relay that came back to a worker of ours would look as if it had lost its other links.
        """
        for child in self._children.values():
            child.let_go()
        await self._pages.end()
        with trio.move_on_after(LET_GO_S):
            await wait_until(self._have_closed)
        for child in self._children.values():
            if not child.has_closed:
                child.kill("does not let go, and is killed")
        self._listeners.close()
        self._notifier.stopping()
        for child in self._children.values():
            child.depart()

    async def _load_again(self) -> None:
        """Reload in all workers, or in none.

        Raises:
            ConfigError: the new configuration cannot be used; nothing has changed.
            FxError: the gateway is stopping; nothing has changed.
        """
        written = await trio.to_thread.run_sync(config.load, self._config_path, os.environ)
        problems = await trio.to_thread.run_sync(verify_files, written, self._config_path, datetime.now(UTC))
        if problems:
            raise ConfigError(problems)
        fresh, waiting = config.take_up(self._settings, written)
        wanted = {str(door.listen): door.listen for door in fresh.doors if not self._drains.is_drained}
        self._check_goes_on()
        opened = self._listeners.open_more(wanted.values())
        try:
            prepared = await self._reload.prepare({"settings": as_message(fresh), "config": str(self._config_path)}, opened)
            self._check_goes_on()
        except BaseException:
            self._listeners.give_up(opened.values())
            raise
        self._commit(fresh, opened, wanted)
        await self._reload.commit(prepared)
        if waiting:
            logger.warning("changed, but not before the next restart: %s", ", ".join(waiting))
        logger.info("reloaded %s", self._config_path)

    def _check_goes_on(self) -> None:
        if self._stop.is_set():
            raise FxError("the gateway is stopping, and would open its doors again")

    def _commit(self, fresh: GatewaySettings, opened: Mapping[str, socket.socket], wanted: Mapping[str, Address]) -> None:
        """Take the configuration up in the parent; workers that are started from now on get it."""
        self._settings = self._facts.settings = fresh
        self._owners.limit = fresh.limits.relays
        self._listeners.commit(opened, wanted)
        logs.configure(fresh.log.level, fresh.log.style, sys.stderr)
        self._facts.listening = (*self._listeners.bound().values(), self._facts.listening[-1])

    def _take_no_clients(self) -> None:
        """An administrator has drained the gateway: close the doors, so that no client waits in a queue that no worker serves."""
        self._facts.is_draining = True
        self._listeners.close_doors()
