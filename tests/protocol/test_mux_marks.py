"""Proof that the peer has acted on what was sent to it."""

from mux_pair import Pair
from test_mux_rules import answers, arrive

from fxtunnel.protocol import frames


def test_an_answer_comes_before_the_mark_behind_what_takes_it_back() -> None:
    """Also where an acknowledgement of all of it comes sooner, as it does when a PING stands in front of the opening."""
    pair = Pair()
    gateway, relay = pair.gateway.mux, pair.relay.mux
    gateway.press()
    stream = pair.gateway.open()
    mark = stream.take_back()
    assert stream.send_credit == 0
    relay.receive(memoryview(bytes(gateway.ring.unsent(1 << 20))), 1_000.0)
    gateway.ring.advance(gateway.ring.unsent_bytes)
    assert not relay.streams
    assert gateway.passed_mark < mark
    kinds = [kind for kind, _, _ in answers(pair.relay)]
    assert kinds == [frames.ACK, frames.PONG, frames.PONG]
    arrive(pair.gateway, frames.encode_u64(frames.PONG, 0))
    assert gateway.passed_mark < mark
    arrive(pair.gateway, frames.encode_accept(stream.id, 65_536), frames.encode_u64(frames.PONG, (1 << 63) + mark))
    assert pair.gateway.endpoints[stream.id].events[0] == ("accept",)
    assert gateway.passed_mark == mark
    assert gateway.min_rtt_s == 0.0
