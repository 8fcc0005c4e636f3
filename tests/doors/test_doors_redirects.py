"""Relays that redirect against the rules lead no client in circles, and no gateway into breaking the rules itself."""

from itertools import count

import pytest
from peers import echo, exchange, refused
from plane import Contexts, open_plane

from fxtunnel.protocol.opening import Opening


async def test_a_relay_that_redirects_to_ever_new_names_is_believed_four_times(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, openings = count(), list[Opening]()

    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        second = await plane.add_relay(await plane.serve(echo), name="b")

        def redirect(session, stream, service, opening):
            openings.append(opening)
            stream.redirect(f"n{next(numbers)}")

        monkeypatch.setattr(first.desk, "_deliver", redirect)
        assert await exchange(plane.add_door(), b"x") == b"x"
        assert [len(opening.avoid) for opening in openings] == [0, 1, 2, 3, 4]
        assert all(opening.via is None for opening in openings)
        assert (first.far_session.is_up, second.far_session.mux.opened) == (True, 1)


async def test_a_relay_that_was_redirected_to_redirects_nobody(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    openings: list[Opening] = []

    async with open_plane(contexts) as plane:
        relays = {name: await plane.add_relay(await plane.serve(echo), name=name) for name in "abc"}
        for name, target in (("a", "b"), ("b", "c")):

            def redirect(session, stream, service, opening, target=target):
                openings.append(opening)
                stream.redirect(target)

            monkeypatch.setattr(relays[name].desk, "_deliver", redirect)
        for name in "bc":
            plane.registry.offers.remove(relays[name].id)
        await refused(plane.add_door())
        assert [(opening.via, opening.avoid) for opening in openings] == [(None, ()), ("a", ()), (None, ("b",))]
        assert relays["c"].far_session.mux.opened == 0


@pytest.mark.parametrize("name", ["a", "no name", "\x7f", "nobody"])
async def test_a_redirect_to_itself_or_to_nobody(contexts: Contexts, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        monkeypatch.setattr(first.desk, "_deliver", lambda session, stream, *_: stream.redirect(name))
        await refused(plane.add_door())
        assert first.far_session.mux.opened == (2 if name.isalpha() else 1)
        assert first.far_session.is_up
