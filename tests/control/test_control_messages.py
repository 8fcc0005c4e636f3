"""The control link's messages: what goes out comes in, and nothing else does."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code, Refusal
from fxtunnel.control import messages
from fxtunnel.control.messages import MESSAGE_BYTES, decode, encode
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import GatewayId, InstanceId, Offer, ServiceName, SessionId

ONE_OF_EACH = [
    messages.Hello(version="0.1.0", instance=InstanceId("i1"), services=(Offer(ServiceName("ssh")),), caps=("resume",)),
    messages.Hello(
        version="0.1.0", instance=InstanceId("i3"), earlier=(messages.Earlier(instance=InstanceId("i2"), deadline_s=30.0, handover=True),)
    ),
    messages.Welcome(version="0.1.0", gateway_id=GatewayId("gw"), epoch=3, heartbeat_s=5.0, dead_after_s=15.0, hold_s=30.0),
    messages.Refused(code=Refusal.VERSION_MISMATCH, message="update the relay", retry_after_s=1.5),
    messages.TicketRequest(request=7),
    messages.TicketRequest(request=7, sessions=(SessionId("0" * 32),)),
    messages.TicketRequest(request=8, session=SessionId("0" * 32)),
    messages.Ticket(request=7, ticket="fxt_abc", expires_s=30.0),
    messages.Services(services=(Offer(ServiceName("db"), "tcp"),)),
    messages.Load(streams=12),
    messages.Load(streams=12, reluctant=True),
    messages.Ping(n=1),
    messages.Pong(n=1),
    messages.Drain(deadline_s=30.0),
    messages.Closing(code=Code.FENCED, message="another instance", retry_after_s=0.0),
]


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: m.type)
def test_every_message_survives_the_wire(message: messages.Message) -> None:
    assert decode(encode(message)) == message


def test_codes_travel_as_labels() -> None:
    assert json.loads(encode(messages.Closing(code=Code.FENCED)))["code"] == "fenced"


def test_codes_of_later_versions_are_understood_enough() -> None:
    closing = decode('{"type":"closing","code":"moonphase"}')
    refused = decode('{"type":"refused","code":"moonphase"}')
    assert isinstance(closing, messages.Closing)
    assert closing.code is Code.INTERNAL_ERROR
    assert isinstance(refused, messages.Refused)
    assert refused.code is Refusal.BAD_REQUEST


def test_unknown_types_are_ignored_unless_required() -> None:
    assert decode('{"type":"roster","nodes":[]}') is None
    assert decode('{"type":"roster","required":false}') is None
    with pytest.raises(RemoteProtocolError) as caught:
        decode('{"type":"roster","required":true}')
    assert caught.value.code is Code.UNSUPPORTED


def test_a_load_without_its_newer_field_is_not_reluctant() -> None:
    assert decode('{"type":"load","streams":3}') == messages.Load(streams=3, reluctant=False)
    assert decode('{"type":"load","streams":3,"reluctant":true}') == messages.Load(streams=3, reluctant=True)
    with pytest.raises(RemoteProtocolError):
        decode('{"type":"load","streams":3,"reluctant":1}')


def test_drains_and_welcomes_without_their_newer_fields_mean_what_they_did() -> None:
    assert decode('{"type":"drain","deadline_s":3}') == messages.Drain(deadline_s=3, handover=False)
    assert decode('{"type":"drain","deadline_s":3,"handover":true}') == messages.Drain(deadline_s=3, handover=True)
    assert decode('{"type":"drain","deadline_s":0,"relieved":true}') == messages.Drain(deadline_s=0, relieved=True)
    with pytest.raises(RemoteProtocolError):
        decode('{"type":"drain","deadline_s":3,"handover":"yes"}')
    welcome = '{"type":"welcome","version":"0","gateway_id":"g","epoch":1,"heartbeat_s":1,"dead_after_s":2,"hold_s":3}'
    assert getattr(decode(welcome), "process", None) == ""


def test_fields_of_later_versions_are_ignored() -> None:
    assert decode('{"type":"ping","n":4,"colour":"red"}') == messages.Ping(n=4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "\x00",
        '{"type":1}',
        '{"type":"ping"}',
        '{"type":"ping","n":"1"}',
        '{"type":"ping","n":-1}',
        '{"type":"ping","n":1.5}',
        '{"type":"ping","n":true}',
        '{"type":"ping","n":9223372036854775808}',
        '{"type":"drain","deadline_s":NaN}',
        '{"type":"drain","deadline_s":1e999}',
        '{"type":"ticket-request","request":1,"session":"XYZ"}',
        '{"type":"ticket-request","request":1,"sessions":["XYZ"]}',
        '{"type":"ticket-request","request":1,"sessions":[' + ",".join(['"' + "0" * 32 + '"'] * 65) + "]}",
        '{"type":"hello","version":"1","instance":"a b"}',
        '{"type":"hello","version":"1","instance":"a\\n"}',
        '{"type":"services","services":[{"name":"ssh"},{"name":"ssh"}]}',
        '{"type":"services","services":[{"name":"127.0.0.1:22"}]}',
        '{"type":"services","services":"ssh"}',
        '{"type":"ping","n":1',
        '{"type":"x","d":' + "[" * 8000,
    ],
)
def test_malformed_messages_are_the_peers_fault(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(text)


def test_size_is_capped_both_ways() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode('{"type":"ping","n":1}' + " " * MESSAGE_BYTES)
    assert caught.value.code is Code.FRAME_SIZE
    many = tuple(Offer(ServiceName(f"service-{i:050d}")) for i in range(400))
    with pytest.raises(LocalProtocolError):
        encode(messages.Services(services=many))


def test_a_refused_ticket_never_shows_in_the_error() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode('{"type":"ticket","request":"x","ticket":"fxt_canary","expires_s":1}')
    assert "canary" not in str(caught.value)
    assert "canary" not in repr(messages.Ticket(request=1, ticket="fxt_canary", expires_s=1))


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), lambda c: st.dictionaries(st.text(), c)).map(json.dumps))
def test_any_text_is_a_message_or_the_peers_fault(text: str) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(text)
