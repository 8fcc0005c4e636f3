"""Pure: what the medians are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

_MOST_DIGITS: Final = 6

Medians = Mapping[str, Mapping[str, Mapping[str, float]]]  # measure, peer, metric


class Verdict(Enum):
    """How a target came out."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of one measure, of FX Gateway or of another peer."""

    measure: str
    name: str
    peer: str = "fx"

    def of(self, medians: Medians) -> float | None:
        """Its median, or None where it was not measured."""
        return medians.get(self.measure, {}).get(self.peer, {}).get(self.name)


@dataclass(frozen=True, slots=True)
class Target:
    """`value`, divided by `against` where there is one, must reach `limit`: at most it, or at least it."""

    title: str
    value: Metric
    limit: float
    unit: str
    against: Metric | None = None
    at_least: bool = False

    def wanted(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}".strip()

    def reached(self, medians: Medians) -> float | None:
        """The number that is compared, or None."""
        value = self.value.of(medians)
        if self.against is None or value is None:
            return value
        base = self.against.of(medians)
        return value / base if base else None

    def verdict(self, medians: Medians) -> Verdict:
        """Met, missed or not measured."""
        reached = self.reached(medians)
        if reached is None:
            return Verdict.UNKNOWN
        return Verdict.MET if self.is_met_by(reached) else Verdict.MISSED

    def is_met_by(self, reached: float) -> bool:
        """Whether this number would do."""
        return reached >= self.limit if self.at_least else reached <= self.limit

    def written(self, reached: float) -> str:
        """The number with two digits behind the point, from 10 on with none; more where it takes more to show its side of the limit."""
        digits = 2 if reached < 10 else 0
        while digits < _MOST_DIGITS and self.is_met_by(float(f"{reached:.{digits}f}")) is not self.is_met_by(reached):
            digits += 1
        return f"{reached:.{digits}f}"


def _bulk() -> list[Target]:
    targets = []
    for word in ("down", "up"):
        cpu = Metric("bulk", f"{word}_cpu_s_per_gib")
        for peer, limit, label in (("nginx", 1.4, "nginx"), ("ssh-tty", 0.8, "ssh -tt -R")):
            against = Metric("bulk", cpu.name, peer)
            targets.append(Target(f"1 bulk stream {word}, CPU s/GiB", cpu, limit, f"× {label}", against))
    return targets


def _resumption() -> list[Target]:
    targets = []
    for word in ("down", "up"):
        cpu = Metric("bulk", f"{word}_cpu_s_per_gib")
        against = Metric("bulk", cpu.name, "fx-noresume")
        targets.append(Target(f"1 bulk stream {word}, resumption on", cpu, 1.1, "× without resumption", against))
    return targets


def _web() -> list[Target]:
    rate, bulk = Metric("get", "requests_per_s", "fx-web"), Metric("https", "cpu_s_per_gib", "fx-web")
    varied = Metric("get", "varied_per_s", "nginx-web")
    return [
        Target("short GETs on kept connections", rate, 0.25, "× nginx", Metric("get", rate.name, "nginx-web"), at_least=True),
        Target("short GETs, no two heads alike", replace(rate, name="varied_per_s"), 0.25, "× nginx", varied, at_least=True),
        Target("WebSocket echo p50", Metric("socket", "ratio", "fx-web"), 1.2, "× a raw stream's"),
        Target("connections led by SNI, CPU", Metric("sni", "ratio", "fx-web"), 1.15, "× a raw door's"),
        Target("TLS ended at the gateway, CPU s/GiB", bulk, 1.3, "× nginx", Metric("https", bulk.name, "nginx-web")),
        Target("GET p99 beside slow clients", Metric("slow", "p99_ratio", "fx-web"), 2, "× without them"),
        Target("memory of the larger daemon, slow clients", Metric("slow", "worst_daemon_mib", "fx-web"), 256, "MiB"),
    ]


def _faster() -> list[Target]:
    """What is aimed at beyond the first aims: to be about as fast as what is written in C, and faster where a tunnel can be."""
    targets = []
    for word in ("down", "up"):
        cpu, rate = Metric("bulk", f"{word}_cpu_s_per_gib"), Metric("bulk", f"{word}_mb_per_s")
        targets += [
            Target(f"further: 1 bulk stream {word}, CPU s/GiB", cpu, 1.1, "× nginx", replace(cpu, peer="nginx")),
            Target(f"further: 1 bulk stream {word}, CPU s/GiB", cpu, 1.3, "× ssh -tt -R, aes128-gcm", replace(cpu, peer="ssh-aes128")),
            Target(f"further: 1 bulk stream {word}, MB/s", rate, 0.9, "× nginx", replace(rate, peer="nginx"), at_least=True),
        ]
    rate16 = Metric("bulk16", "mb_per_s")
    targets += [
        Target("further: 16 bulk streams, CPU s/GiB", _BULK16, 1.15, "× nginx", replace(_BULK16, peer="nginx")),
        Target("further: 16 bulk streams, MB/s", rate16, 0.9, "× nginx", replace(rate16, peer="nginx"), at_least=True),
        Target("further: connections, CPU", _CONN_CPU, 0.1, "× nginx", replace(_CONN_CPU, peer="nginx")),
        Target("further: connections, rate", _CONN_RATE, 5, "× nginx", replace(_CONN_RATE, peer="nginx"), at_least=True),
        Target("further: connections, CPU", _CONN_CPU, 0.6, "× ssh -tt -R", replace(_CONN_CPU, peer="ssh-tty")),
        Target("further: 64-byte echo p50, idle", _IDLE_P50, 1.2, "× ssh -tt -R", replace(_IDLE_P50, peer="ssh-tty")),
        Target("further: echo p50 beside one bulk stream", _BESIDE_P50, 1, "× ssh -tt -R", replace(_BESIDE_P50, peer="ssh-tty")),
        Target("further: echo p99 beside one bulk stream", _BESIDE_P99, 0.6, "× ssh -tt -R", replace(_BESIDE_P99, peer="ssh-tty")),
        Target("further: user memory per client of 10,000", Metric("crowd", "user_kib_per_client"), 2, "KiB"),
    ]
    for way, streams in (("down", "1 stream down"), ("up", "1 stream up"), ("down16", "16 streams down"), ("up16", "16 streams up")):
        share = Metric("rtt", f"{way}_share")
        targets.append(Target(f"further: {streams}, 50 ms and 1 Gbit/s", share, 0.9, "× the line", at_least=True))
    targets.append(Target("further: the larger daemon meanwhile", Metric("rtt", "worst_daemon_mib"), 256, "MiB"))
    for measure, title in (("bulk", "1 bulk stream down"), ("bulk16", "16 bulk streams")):
        cpu = Metric(measure, "down_cpu_s_per_gib" if measure == "bulk" else "cpu_s_per_gib", "workers")
        targets.append(Target(f"further: {title}, 2 workers", cpu, 1.1, "× CPU with one", replace(cpu, peer="fx")))
    return targets


_BULK16: Final = Metric("bulk16", "cpu_s_per_gib")
_CONN_CPU: Final = Metric("conn", "cpu_ms_per_conn")
_CONN_RATE: Final = Metric("conn", "conn_per_s")
_IDLE_P50: Final = Metric("echo", "idle_p50_us")
_BESIDE_P50: Final = Metric("echo", "beside_p50_us")
_BESIDE_P99: Final = Metric("echo", "beside_p99_us")

TARGETS: Final = (
    *_bulk(),
    Target("16 bulk streams, CPU s/GiB", _BULK16, 1.45, "× nginx", Metric("bulk16", "cpu_s_per_gib", "nginx")),
    Target("connect + request + close ×32, CPU", _CONN_CPU, 0.15, "× nginx", Metric("conn", "cpu_ms_per_conn", "nginx")),
    Target("connect + request + close ×32, rate", _CONN_RATE, 3.5, "× nginx", Metric("conn", "conn_per_s", "nginx"), at_least=True),
    Target("connect + request + close ×32, rate", _CONN_RATE, 1, "× ssh -tt -R", Metric("conn", "conn_per_s", "ssh-tty"), at_least=True),
    Target("64-byte echo p50, idle", _IDLE_P50, 1.6, "× ssh -tt -R", Metric("echo", "idle_p50_us", "ssh-tty")),
    Target("64-byte echo p99 beside one bulk stream", _BESIDE_P99, 1, "× ssh -tt -R", Metric("echo", "beside_p99_us", "ssh-tty")),
    Target("64-byte echo p99 beside one bulk stream", _BESIDE_P99, 1, "× ssh -N -R", Metric("echo", "beside_p99_us", "ssh")),
    Target("user memory per idle client", Metric("idle", "user_kib_per_client"), 4, "KiB"),
    Target("echo p50 beside the idle clients", Metric("idle", "p50_ratio"), 2.5, "× without them"),
    Target("memory of the larger daemon, stalled clients", Metric("stalled", "worst_daemon_mib"), 256, "MiB"),
    Target("goodput of active streams beside them", Metric("stalled", "goodput_ratio"), 0.9, "× without them", at_least=True),
    *_resumption(),
    Target("streams that survive two cuts", Metric("cut", "survived"), 1, "× all", Metric("cut", "streams"), at_least=True),
    *_web(),
    *_faster(),
)
