"""Pure: the messages of a control link, as JSON text (PROTOCOL.md, 3)."""

from typing import Annotated, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import NAME_PATTERN, GatewayId, InstanceId, Offer, SessionId, is_name

PROTOCOL_VERSION: Final = 1
CAP_LEAVING: Final = "leaving"
"""In a relay's hello: this instance drains, and wants to be let in only where it has sessions."""
MESSAGE_BYTES: Final = 16 * 1024  # PROTOCOL.md, 3; protects memory, and the reader from long stalls
CAP_WORKERS: Final = "workers"
"""In a relay's hello: it names the gateway's worker when it dials again (PROTOCOL.md, 1)."""
CAP_NAMED: Final = "named"
"""In a gateway's welcome: its process can be dialled by name even after it has handed its address on (PROTOCOL.md, 3.1)."""
MAX_EARLIER: Final = 64
"""Earlier processes that a hello or a welcome names: far more than drain at once, and within MESSAGE_BYTES."""
WORKER_PATTERN: Final = r"^[0-9]{0,4}$"
TEXT_CHARS: Final = 512  # of a message for people: ends up in a log line


def _code_from_label(value: object) -> object:
    """Codes of later versions become INTERNAL_ERROR, as in frames (PROTOCOL.md, 8)."""
    return _CODES.get(value, Code.INTERNAL_ERROR) if isinstance(value, str) else value


def _known_refusal(value: object) -> object:
    """Refusals of later versions become BAD_REQUEST: trying again unchanged would not help."""
    return _REFUSALS.get(value, Refusal.BAD_REQUEST) if isinstance(value, str) else value


def _distinct_names(offers: tuple[Offer, ...]) -> tuple[Offer, ...]:
    seen: set[str] = set()
    for offer in offers:
        if not is_name(offer.name) or not is_name(offer.protocol):
            raise ValueError("a service and its protocol are 1 to 64 of A-Z a-z 0-9 . _ -")
        if offer.name in seen:
            raise ValueError("a service is offered twice")
        seen.add(offer.name)
    return offers


_CODES: Final = {code.label: code for code in Code}
_REFUSALS: Final = {refusal.value: refusal for refusal in Refusal}

Text = Annotated[str, Field(max_length=TEXT_CHARS)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Counter = Annotated[int, Field(ge=0, lt=2**63)]
Label = Annotated[str, Field(max_length=64)]
Version = Annotated[str, Field(max_length=64)]
Offers = Annotated[tuple[Offer, ...], AfterValidator(_distinct_names)]
Labels = Annotated[tuple[Label, ...], Field(max_length=64)]
Instance = Annotated[InstanceId, Field(pattern=NAME_PATTERN)]
Session = Annotated[SessionId, Field(pattern=r"^[0-9a-f]{32}$")]
# On the wire a code is its label ("fenced"): a person reading a trace needs no table.
CodeLabel = Annotated[Code, BeforeValidator(_code_from_label), PlainSerializer(lambda code: code.label, return_type=str, when_used="json")]
RefusalLabel = Annotated[Refusal, BeforeValidator(_known_refusal)]


class _Message(BaseModel):
    # Fields a later version adds are ignored; values are never coerced ("1" is no number).
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Earlier(_Message):
    """An instance of the relay before this one, which goes away: what its `Drain` says, if that has not arrived."""

    instance: Instance
    deadline_s: Seconds
    handover: bool = False


class Hello(_Message):
    """The relay's first message. `earlier`: its processes that have made way for this one, and may still have streams."""

    type: Literal["hello"] = "hello"
    v: Counter = PROTOCOL_VERSION
    version: Version
    instance: Instance
    services: Offers = ()
    caps: Labels = ()
    need: Labels = ()
    earlier: Annotated[tuple[Earlier, ...], Field(max_length=MAX_EARLIER)] = ()


class Welcome(_Message):
    """The gateway's answer to `Hello`; its times govern both ends.

    `process` is random for each run of the gateway: another name means another process, without the relay's sessions. `earlier` are the
    processes to which this one passes on the connections that name them.
    """

    type: Literal["welcome"] = "welcome"
    v: Counter = PROTOCOL_VERSION
    version: Version
    gateway_id: Annotated[GatewayId, Field(pattern=NAME_PATTERN)]
    epoch: Counter
    heartbeat_s: Annotated[float, Field(gt=0, le=3_600, allow_inf_nan=False)]
    dead_after_s: Annotated[float, Field(gt=0, le=3_600, allow_inf_nan=False)]
    hold_s: Seconds
    caps: Labels = ()
    process: Label = ""
    earlier: Annotated[tuple[Label, ...], Field(max_length=MAX_EARLIER)] = ()
    worker: Annotated[str, Field(pattern=WORKER_PATTERN)] = ""


class Refused(_Message):
    """Instead of `Welcome`; the link is closed behind it."""

    type: Literal["refused"] = "refused"
    code: RefusalLabel
    message: Text = ""
    retry_after_s: Seconds = 0.0


class TicketRequest(_Message):
    """The relay wants to dial a data link: a new session (None), or to resume one. `request` comes back in `Ticket`.

    `sessions`, when it asks for a new one, are all those it still has at this gateway: it will never resume any other.
    """

    type: Literal["ticket-request"] = "ticket-request"
    request: Counter
    session: Session | None = None
    sessions: Annotated[tuple[Session, ...], Field(max_length=64)] | None = None


class Ticket(_Message):
    """Admits one data link within `expires_s`."""

    type: Literal["ticket"] = "ticket"
    request: Counter
    ticket: Annotated[str, Field(max_length=256, repr=False)]
    expires_s: Seconds


class Services(_Message):
    """What the relay offers from now on."""

    type: Literal["services"] = "services"
    services: Offers


class Load(_Message):
    """How many streams the relay carries for this gateway. `reluctant`: ask other relays first (PROTOCOL.md, 3.3)."""

    type: Literal["load"] = "load"
    streams: Counter
    reluctant: bool = False


class Ping(_Message):
    """Asks for a `Pong` with the same `n`."""

    type: Literal["ping"] = "ping"
    n: Counter


class Pong(_Message):
    """Answers a `Ping`."""

    type: Literal["pong"] = "pong"
    n: Counter


class Drain(_Message):
    """No new streams, please; the open ones may finish until the deadline.

    `handover`, from a relay: another instance will follow; until it serves, streams that no other relay can take are still welcome.
    `relieved`, from a gateway: that instance serves now. Gateways that do not know this field send a deadline of 0 instead.
    """

    type: Literal["drain"] = "drain"
    deadline_s: Seconds
    handover: bool = False
    relieved: bool = False


class Closing(_Message):
    """The last message before a deliberate close."""

    type: Literal["closing"] = "closing"
    code: CodeLabel
    message: Text = ""
    retry_after_s: Seconds = 0.0


Message = Hello | Welcome | Refused | TicketRequest | Ticket | Services | Load | Ping | Pong | Drain | Closing
_M = TypeVar("_M", bound=BaseModel)


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Annotated[str, Field(max_length=64)]
    required: bool = False


_KINDS: Final[dict[str, type[Message]]] = {
    "hello": Hello,
    "welcome": Welcome,
    "refused": Refused,
    "ticket-request": TicketRequest,
    "ticket": Ticket,
    "services": Services,
    "load": Load,
    "ping": Ping,
    "pong": Pong,
    "drain": Drain,
    "closing": Closing,
}


def encode(message: Message) -> str:
    """The message as one line of JSON.

    Raises:
        LocalProtocolError: it would be longer than MESSAGE_BYTES, for example with hundreds of services.
    """
    text = message.model_dump_json()
    if len(text.encode()) > MESSAGE_BYTES:
        raise LocalProtocolError(f"a {message.type} message of more than {MESSAGE_BYTES} bytes")
    return text


def decode(text: str | bytes) -> Message | None:
    """The message in a peer's text; None for a type this version does not know and need not.

    Raises:
        RemoteProtocolError: not JSON, not a message, too long, a field outside its range, or an unknown type that is required.
    """
    if len(text) > MESSAGE_BYTES:
        raise RemoteProtocolError(Code.FRAME_SIZE, f"a control message of more than {MESSAGE_BYTES} bytes")
    # pydantic's own JSON parser, not json.loads: deep nesting is an error there, not a RecursionError.
    envelope = _validated(_Envelope, text, "control message")
    kind = _KINDS.get(envelope.type)
    if kind is None:
        if envelope.required:
            raise RemoteProtocolError(Code.UNSUPPORTED, f"the peer requires messages of type {envelope.type!r}: update this end")
        return None
    return _validated(kind, text, f"{envelope.type} message")


def _validated(kind: type[_M], text: str | bytes, what: str) -> _M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        # The input itself stays out of the text: it may be a ticket.
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"malformed {what}: {where}: {first['msg']}"[:TEXT_CHARS]) from None
