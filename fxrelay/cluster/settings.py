"""Port: the [cluster] and [node] sections of relay.toml: where the cluster's state is kept, and what this node says about itself."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from fxtunnel.kit.sections import Seconds, Section
from fxtunnel.kit.settings import ConfigPath, NameField, OptionalPath

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PRIVATE_NETWORKS: Final = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
"""RFC 1918, RFC 6598 and RFC 4193: where nodes may be, unless the configuration says otherwise. Link-local addresses are left out on
purpose: cloud metadata services answer there."""
_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def _network(value: str) -> str:
    ipaddress.ip_network(value)  # its ValueError says what is wrong
    return value


def _function(value: str) -> str:
    if not _FUNCTION.fullmatch(value):
        raise ValueError('expected "module:function"')
    return value


PathKind = Literal["local", "redirect", "direct"]


class ClusterSection(Section):
    """What the members of a cluster share, and how nodes are reached."""

    store: str | None = Field(
        None,
        description="Where server objects are kept: sqlite:PATH, for the relays of one machine. Default: cluster.db in state_dir.",
    )
    broker: OptionalPath | None = Field(None, description="broker.json of a Redis that all members share, instead of `store`; mode 0600.")
    publish_s: Seconds = Field(10.0, ge=0.1, le=300, description="Seconds between two server objects of this node.")
    stale_s: Seconds = Field(30.0, ge=0.2, le=3_600, description="Age at which a server gets no more sessions.")
    down_s: Seconds = Field(90.0, ge=0.5, le=86_400, description="Age at which a server counts as down.")
    resync_s: Seconds = Field(
        60.0, ge=0.2, le=3_600, description="Seconds between two readings of the whole store, for changes that were missed."
    )
    forget_after_s: Seconds = Field(
        604_800.0, ge=0, le=31_536_000, description="Seconds without a word after which a node leaves the store; 0: it stays for ever."
    )
    paths: tuple[PathKind, ...] = Field(
        ("local", "redirect", "direct"), min_length=1, description="Ways to a chosen node, in the order in which they are tried."
    )
    force_indirect: bool = Field(False, description="Never connect to other nodes directly.")
    networks: tuple[Annotated[str, AfterValidator(_network)], ...] = Field(
        PRIVATE_NETWORKS,
        description="Where other nodes' addresses must lie for a direct connection. Loopback is allowed where `relay.address` is one.",
    )
    lease_s: Seconds = Field(
        15.0, ge=1, le=600, description="Seconds a login on a reserved server outlives its relay; the same at all relays of a cluster."
    )
    on_lost_lease: Literal["keep", "end"] = Field(
        "keep", description="Streams to reserved servers whose lease could not be renewed for lease_s because the store is away."
    )
    script_timeout_s: Seconds = Field(5.0, ge=0.1, le=60, description="Seconds one balancing script may take.")
    script_memory_bytes: int = Field(64 << 20, ge=8 << 20, le=1 << 32, description="Memory one balancing script may take.")

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        kind, _, path = value.partition(":")
        if kind != "sqlite" or not path:
            raise ValueError('expected "sqlite:PATH"; a Redis is given by `broker`')
        if info.context:
            path = str(Path(info.context["directory"], path))
        return f"sqlite:{path}"

    @field_validator("broker")
    @classmethod
    def _check_one_store(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("store") is not None:
            raise ValueError("there is `store` as well; keep one of them")
        return value

    @field_validator("forget_after_s")
    @classmethod
    def _check_forgetting(cls, value: float, info: ValidationInfo) -> float:
        down_s = info.data.get("down_s", 0.0)
        if 0 < value <= down_s:
            raise ValueError(f"a node is down after {down_s:g} s, and forgotten later than that; or 0, never")
        return value

    @field_validator("paths")
    @classmethod
    def _check_paths(cls, value: tuple[PathKind, ...]) -> tuple[PathKind, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a path twice")
        return value


class NodeSection(Section):
    """What this node says about itself, besides what is measured."""

    static_data: dict[str, Any] = Field(default_factory=dict, description='Anything scripts should know: {gpu = true, group = "cad"}.')
    static_data_file: ConfigPath = Field(
        Path("static-data.json"), description="The same as a JSON object in a file, read before every update; need not exist."
    )
    environment_file: ConfigPath = Field(
        Path("fastx.env"),
        description="METADATA_NAME=value lines, as in the environment; need not exist. $FX_CONFIG_DIR/fastx.env is read first.",
    )
    metrics_dir: ConfigPath = Field(Path("metrics.d"), description="Executables that print a JSON value each; need not exist.")
    metrics: dict[NameField, Annotated[str, AfterValidator(_function)]] = Field(
        default_factory=dict, description='Python functions without arguments that return a JSON value: {queue = "site_metrics:queue"}.'
    )
    sessions: str = Field(
        "connections",
        description="How sessions are counted: `connections` to its services' ports, or exec:FILE, which prints a JSON list of sessions.",
    )
    max_sessions: int = Field(0, ge=0, le=1_000_000, description="Sessions this node takes; 0: no limit.")
    weight: int = Field(100, ge=0, le=10_000, description="Share of new sessions for builtin:weighted-least; 0: none.")
    pool: str = Field("", max_length=64, description="serverPool, for scripts.")
    enable_reservations: bool = Field(False, description="One user at a time: a server with a login belongs to its user.")

    @field_validator("sessions")
    @classmethod
    def _check_sessions(cls, value: str, info: ValidationInfo) -> str:
        if value == "connections":
            return value
        kind, _, path = value.partition(":")
        if kind != "exec" or not path:
            raise ValueError('expected "connections" or "exec:FILE"')
        return f"exec:{Path(info.context['directory'], path) if info.context else path}"
