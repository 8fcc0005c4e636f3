"""The ways to a chosen node: each of them, their order, and what happens when one does not work."""

from itertools import permutations

import pytest
import trio
from delivery_rig import GATEWAY, NOBODY, ScriptedChooser, Spec, add_pool_relay, serve_nodes
from peers import connect, hanging_port, pattern, receive_all, refused
from plane import SERVICE, Contexts, Plane, open_plane

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.delivery import DeliveryLimits
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.model import RelayId

A, B, C = "127.0.0.11", "127.0.0.12", "127.0.0.13"
SIZES = (0, 1, 4_096, 4_097, 100_000)


async def ask(port: int, data: bytes) -> bytes:
    """What the pool answers to `data` and the end of it."""
    async with await connect(port) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        with trio.fail_after(5):
            return await receive_all(stream)


def reachable(path: PathKind, name: str = "b", address: str = B) -> Spec:
    return Spec(name, is_local=path == "local", address=address if path == "direct" else "", can_redirect=path == "redirect")


@pytest.mark.parametrize("path", ["local", "redirect", "direct"])
async def test_each_path_carries_everything_and_keeps_half_close(contexts: Contexts, path: PathKind) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, A, B)
        chooser = ScriptedChooser(reachable(path, "a" if path == "local" else "b"))
        first = await add_pool_relay(plane, "a", chooser, nodes.port, host=A)
        port = plane.add_door()
        if path == "redirect":
            await plane.quiet()
        other = ScriptedChooser()
        second = await add_pool_relay(plane, "b", other, nodes.port, host=B)
        plane.registry.offers.remove(second.id)  # it is there, but clients get to it by redirects only
        where = A if path == "local" else B
        for size in SIZES:
            assert await ask(port, pattern(size)) == where.encode()
        assert nodes.got[where] == [pattern(size) for size in SIZES]
        await chooser.settled()
        assert [len(claim.connected_at) for claim in chooser.claims] == [int(path != "redirect")] * len(SIZES)
        assert first.desk.counters.paths_by_service == {SERVICE: {path: len(SIZES)}}
        assert second.desk.counters.paths_by_service == ({SERVICE: {"local": len(SIZES)}} if path == "redirect" else {})
        assert not other.asked
        wanted, excluded = chooser.asked[0]
        assert (wanted.service, wanted.gateway_id, excluded) == (SERVICE, GATEWAY, frozenset())
        assert wanted.client.startswith("127.0.0.1:")
        assert len({wanted.trace_id for wanted, _ in chooser.asked}) == len(SIZES)


@pytest.mark.parametrize("order", list(permutations(("local", "redirect", "direct"))))
async def test_the_configuration_orders_the_paths(contexts: Contexts, order: tuple[PathKind, ...]) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, A, B, C)
        chooser = ScriptedChooser(Spec("b", is_local=True, address=C, can_redirect=True))
        relay = await add_pool_relay(plane, "a", chooser, nodes.port, host=A, paths=order)
        port = plane.add_door()
        second = await add_pool_relay(plane, "b", ScriptedChooser(), nodes.port, host=B)
        plane.registry.offers.remove(second.id)
        where = {"local": A, "redirect": B, "direct": C}[order[0]]
        assert await ask(port, b"x") == where.encode()
        assert relay.desk.counters.paths_by_service == {SERVICE: {order[0]: 1}}


async def test_the_next_path_when_a_connection_is_refused(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, B)
        chooser = ScriptedChooser(Spec("a", is_local=True, address=B))
        relay = await add_pool_relay(plane, "a", chooser, nodes.port)
        for size in SIZES:
            assert await ask(plane.add_door(), pattern(size)) == B.encode()
        assert nodes.got[B] == [pattern(size) for size in SIZES]
        assert relay.desk.counters.paths_by_service == {SERVICE: {"direct": len(SIZES)}}
        assert len(chooser.asked) == len(SIZES)


async def redirected_in_vain(plane: Plane, port: int, size: int, where: str) -> None:
    with trio.fail_after(5):
        assert await ask(port, pattern(size)) == where.encode()


@pytest.mark.parametrize("size", SIZES)
async def test_another_path_when_the_node_redirected_to_refuses(contexts: Contexts, size: int) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, C)
        chooser = ScriptedChooser(Spec("b", address=C, can_redirect=True))
        first = await add_pool_relay(plane, "a", chooser, nodes.port)
        port = plane.add_door()
        other = ScriptedChooser(Spec("b", address=C))
        second = await add_pool_relay(plane, "b", other, nodes.port)
        plane.registry.offers.remove(second.id)
        assert await ask(port, pattern(size)) == C.encode()
        assert nodes.got[C] == [pattern(size)]
        assert first.desk.counters.paths_by_service == {SERVICE: {"redirect": 1, "direct": 1}}
        assert (first.far_session.mux.opened, second.far_session.mux.opened) == (2, 1)
        assert not other.asked, "a relay that was redirected to asks for no other node"
        await chooser.settled()


@pytest.mark.parametrize("name", ["nobody", "a", "not a name", "r" * 64])
async def test_another_path_when_the_node_redirected_to_is_not_there(contexts: Contexts, name: str) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, C)
        chooser = ScriptedChooser(Spec(name, address=C, can_redirect=True))
        await add_pool_relay(plane, "a", chooser, nodes.port)
        if name == "not a name":
            await refused(plane.add_door())  # no `not` can name it, so its redirect is a refusal
        else:
            assert await ask(plane.add_door(), b"early") == C.encode()
            assert nodes.got[C] == [b"early"]
            assert plane.relays[0].far_session.mux.opened == 2
        await chooser.settled()


async def test_another_path_when_the_relay_redirected_to_is_lost_before_it_accepts(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=0.3, heartbeat_s=0.1, dead_after_s=0.5)) as plane:
        nodes = serve_nodes(plane, B, C)
        chooser = ScriptedChooser(Spec("b", address=C, can_redirect=True))
        await add_pool_relay(plane, "a", chooser, nodes.port)
        port = plane.add_door()
        second = await add_pool_relay(plane, "b", ScriptedChooser(), nodes.port, host=B)
        plane.registry.offers.remove(second.id)
        second.redials = False
        assert second.wire is not None
        second.wire.silence()
        assert await ask(port, b"SSH-2.0-early") == C.encode()
        assert nodes.got == {B: [], C: [b"SSH-2.0-early"]}


async def test_the_routes_go_on_when_who_redirected_is_gone(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, C)
        chooser = ScriptedChooser(Spec("b", address=C, can_redirect=True))
        first = await add_pool_relay(plane, "a", chooser, nodes.port)
        port = plane.add_door()
        chooser.on_choice = lambda: plane.registry.mark_draining(first.id, first.instance)
        second = await add_pool_relay(plane, "b", ScriptedChooser(Spec("c", address=C)), nodes.port)
        assert await ask(port, b"early") == C.encode()
        assert nodes.got[C] == [b"early"]
        assert second.far_session.mux.opened == 2, "refused when it was redirected to, and then asked on its own account"


async def test_relays_that_redirect_to_each_other(contexts: Contexts) -> None:
    """Nobody has the service: each says the other one has it. With `via` neither may say so twice."""
    async with open_plane(contexts) as plane:
        choosers = {name: ScriptedChooser(Spec(other, can_redirect=True)) for name, other in ("ab", "ba")}
        for name, chooser in choosers.items():
            await add_pool_relay(plane, name, chooser, 9)
        await refused(plane.add_door(), 3)
        assert plane.doors[0].counters.refused == {"all-refused": 1}
        # a, b (via), a (not b); b (not b), a (via), b (not b, not a)
        assert sum(relay.far_session.mux.opened for relay in plane.relays) == 6
        for chooser in choosers.values():
            await chooser.settled()


async def test_a_redirect_may_name_no_more_than_four_in_vain(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(*(Spec(f"n{number}", can_redirect=True) for number in range(3)), Spec("a", is_local=True))
        nodes = serve_nodes(plane, A)
        await add_pool_relay(plane, "a", chooser, nodes.port, host=A)
        assert await ask(plane.add_door(), b"x") == A.encode()
        assert plane.relays[0].far_session.mux.opened == 4
        chooser.nodes = tuple(Spec(f"n{number}", can_redirect=True) for number in range(9))
        await refused(plane.add_door(), 3)
        await chooser.settled()


async def test_nodes_that_cannot_be_reached_are_excluded(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, C)
        chooser = ScriptedChooser(Spec("x", address=NOBODY), Spec("y"), Spec("z", address="nonsense"), Spec("c", address=C))
        relay = await add_pool_relay(plane, "a", chooser, nodes.port)
        assert await ask(plane.add_door(), pattern(5_000)) == C.encode()
        assert nodes.got[C] == [pattern(5_000)]
        assert [sorted(excluded) for _, excluded in chooser.asked] == [[], ["x"], ["x", "y"], ["x", "y", "z"]]
        assert len({wanted.trace_id for wanted, _ in chooser.asked}) == 1
        await chooser.settled()
        chooser.nodes = (*(Spec(name, address=NOBODY) for name in "vwxyz"), Spec("c", address=C))
        await refused(plane.add_door(), 3)
        assert len(chooser.asked) == 8
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_a_hanging_path_leaves_time_for_the_next(contexts: Contexts) -> None:
    with hanging_port() as hanging:
        async with open_plane(contexts) as plane:
            chooser = ScriptedChooser(Spec("x", address="127.0.0.1"), Spec("a", is_local=True))
            limits = DeliveryLimits(connect_timeout_s=0.2)
            nodes = serve_nodes(plane, A)
            relay = await add_pool_relay(plane, "a", chooser, hanging, limits=limits)
            (pool,) = relay.table.services()
            local = await add_pool_relay(plane, "spare", ScriptedChooser(), nodes.port, host=A)
            relay.table.replace([type(pool)(SERVICE, A, hanging, local.table.services()[0].endpoints)])
            plane.registry.offers.remove(RelayId("spare"))
            assert await ask(plane.add_door(), b"early") == A.encode()
            assert nodes.got[A] == [b"early"]


async def test_via_serves_here_or_refuses(contexts: Contexts) -> None:
    """A relay that was redirected to needs no chooser, and respects its own order of paths."""
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, B)
        first = await add_pool_relay(plane, "a", ScriptedChooser(Spec("b", can_redirect=True)), nodes.port)
        port = plane.add_door()
        second = await add_pool_relay(plane, "b", ScriptedChooser(), nodes.port, host=B)
        plane.registry.offers.remove(second.id)
        placer, second.desk.placer = second.desk.placer, None
        assert await ask(port, b"x") == B.encode()
        assert placer is not None
        second.desk.placer = placer
        placer.paths = ("redirect", "direct")
        await refused(port, 3)
        assert second.desk.counters.refused_by_service == {SERVICE: {"no-service": 1}}
        assert first.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_pool_without_a_chooser_and_pool_without_an_address(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await add_pool_relay(plane, "a", ScriptedChooser(Spec("a", is_local=True)), 9)
        (pool,) = relay.table.services()
        relay.table.replace([type(pool)(SERVICE, "nowhere", 9, ())])
        await refused(plane.add_door(), 3)
        relay.desk.placer = None
        await refused(plane.add_door(), 3)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1, "no-service": 1}}
