"""Task: the measures of the web: what is done to one running peer, and the numbers that come of it."""

import json
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import processes
from benchmarks.measures import GIB, MIB, SETTLE_S, Bench, Measure, Numbers
from benchmarks.peers import Peer, Running
from benchmarks.processes import BenchmarkError

HELLO_WIDE: Final = 32
TURNS: Final = 3
"""How often two ways through the same daemons take turns within a sample."""
_PATTERN_BYTES: Final = 262_144
_RECEIVE_BYTES: Final = 262_144


def _get(bench: Bench, running: Running) -> Numbers:
    """Short GETs on kept connections: all alike, then each with a field of its own, then one connection alone."""
    port = running.doors.get("http", running.port)
    before_s = processes.cpu_s(running.daemons.values())
    done = bench.web.run("get", port, bench.sizes.web_wide, bench.sizes.web_s)
    cpu_s = processes.cpu_s(running.daemons.values()) - before_s
    varied = bench.web.run("vary", port, bench.sizes.web_wide, bench.sizes.web_s)
    alone = bench.web.run("get", port, 1, bench.sizes.web_s / 2)
    failed = done["failed"] + varied["failed"] + alone["failed"]
    if failed or not done["done"]:
        raise BenchmarkError(f"{failed:.0f} requests failed")
    return {
        "requests_per_s": done["done"] / done["seconds"],
        **({"cpu_us_per_request": cpu_s / done["done"] * 1e6} if running.daemons else {}),
        "varied_per_s": varied["done"] / varied["seconds"],
        "p50_us": done["p50_us"],
        "p99_us": done["p99_us"],
        "alone_p50_us": alone["p50_us"],
    }


def _socket(bench: Bench, running: Running) -> Numbers:
    """A WebSocket's frame to and fro: by the HTTP service after its 101, and down a raw stream, in turns."""
    seconds = bench.sizes.web_s / TURNS
    found: dict[str, list[float]] = {"http": [], "tcp": []}
    for _ in range(TURNS):
        for kind, seen in found.items():
            seen.append(bench.web.run("socket", running.doors[kind], seconds)["p50_us"])
    upgraded, raw = median(found["http"]), median(found["tcp"])
    return {"upgraded_p50_us": upgraded, "raw_p50_us": raw, "ratio": upgraded / raw}


def _sni(bench: Bench, running: Running) -> Numbers:
    """Connections that begin with the same ClientHello, at a door that routes by its name and at a raw one, in turns."""
    found: dict[str, list[float]] = {"sni": [], "tcp": []}
    with tempfile.NamedTemporaryFile() as file:
        file.write(_client_hello())
        file.flush()
        for _ in range(TURNS):
            for kind, seen in found.items():
                before_s = processes.cpu_s(running.daemons.values())
                done = bench.web.run("hello", running.doors[kind], HELLO_WIDE, bench.sizes.web_s / 2, file.name)
                if done["failed"] or not done["done"]:
                    raise BenchmarkError(f"{kind}: {done['failed']:.0f} connections failed")
                seen.append((processes.cpu_s(running.daemons.values()) - before_s) / done["done"] * 1e3)
    led, raw = median(found["sni"]), median(found["tcp"])
    return {"sni_cpu_ms": led, "raw_cpu_ms": raw, "ratio": led / raw}


def _client_hello() -> bytes:
    """What OpenSSL says first, with SNI and ALPN."""
    context = _unverified()
    context.set_alpn_protocols(["h2", "http/1.1"])
    out = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="bench.example")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return out.read()
    raise BenchmarkError("no ClientHello")


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _https(bench: Bench, running: Running) -> Numbers:
    """One body of so many bytes by a door that ends TLS; it goes on in the tunnel's TLS."""
    size = bench.sizes.web_bytes
    with socket.create_connection(("127.0.0.1", running.doors["https"]), 30) as plain, _unverified().wrap_socket(plain) as tls:
        before_s, began = processes.cpu_s(running.daemons.values()), time.monotonic()
        tls.sendall(b"GET /bytes/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % size)
        _take(tls, size)
        seconds = time.monotonic() - began
        cpu_s = processes.cpu_s(running.daemons.values()) - before_s
    return {"cpu_s_per_gib": cpu_s / (size / GIB), "mb_per_s": size / seconds / 1e6, "cipher_bits": (tls.cipher() or ("", "", 0))[2]}


def _take(tls: ssl.SSLSocket, size: int) -> None:
    buffer = memoryview(bytearray(_RECEIVE_BYTES))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += tls.recv(1)
    pattern, at = b"", 0
    while at < size:
        count = tls.recv_into(buffer)
        if not count:
            raise BenchmarkError(f"the body ended after {at} of {size} bytes")
        piece = bytes(buffer[:count])
        if at < _PATTERN_BYTES:
            pattern += piece[: _PATTERN_BYTES - at]
        else:
            begin = at % _PATTERN_BYTES
            wanted = pattern[begin : begin + count] + pattern[: max(0, begin + count - _PATTERN_BYTES)]
            if piece != wanted:
                raise BenchmarkError(f"the body differs after {at} bytes")
        at += count


def _slow(bench: Bench, running: Running) -> Numbers:
    """A client's requests, alone, and beside clients that take their time at the doors that speak HTTP and at the relay behind them."""
    alone = bench.web.run("get", running.doors["http"], 1, bench.sizes.web_s)
    before = {name: processes.memory(pid) for name, pid in running.daemons.items()}
    half = bench.sizes.slow_clients // 2
    with _crowd(running.doors["http"], half) as plain, _crowd(running.doors["https-web"], half, "tls") as secure:
        stood = [_line(crowd) for crowd in (plain, secure)]
        time.sleep(SETTLE_S * 4)
        before_s = processes.cpu_s(running.daemons.values())
        beside = bench.web.run("get", running.doors["http"], 1, bench.sizes.web_s * 2)
        cpu_s = processes.cpu_s(running.daemons.values()) - before_s
        after = {name: processes.memory(pid) for name, pid in running.daemons.items()}
    if beside["failed"] or alone["failed"]:
        raise BenchmarkError("the other client's requests failed")
    return {
        "alone_p99_us": alone["p99_us"],
        "beside_p99_us": beside["p99_us"],
        "p99_ratio": beside["p99_us"] / alone["p99_us"],
        "alone_p50_us": alone["p50_us"],
        "beside_p50_us": beside["p50_us"],
        "refused": sum(line["failed"] for line in stood),
        "cpu_s": cpu_s,
        "worst_daemon_mib": max(held.all_bytes for held in after.values()) / MIB,
        **{f"{name} grown_mib": (after[name].all_bytes - before[name].all_bytes) / MIB for name in after},
    }


@contextmanager
def _crowd(port: int, count: int, *words: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "benchmarks.slow_clients", str(port), str(count), *words]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: "subprocess.Popen[str]") -> Numbers:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError("the slow clients did not come up")
    numbers: Numbers = json.loads(line)
    return numbers


def _started(take: Callable[[Bench, Running], Numbers]) -> Callable[[Bench, Peer], Numbers]:
    def run(bench: Bench, peer: Peer) -> Numbers:
        return take(bench, peer.start(bench.web_port))

    return run


MEASURES: Final = (
    Measure("get", "short GETs on kept connections", _started(_get)),
    Measure("socket", "a WebSocket's echo", _started(_socket)),
    Measure("sni", "connections led by SNI", _started(_sni)),
    Measure("https", "bulk by TLS that ends at the gateway", _started(_https)),
    Measure("slow", "clients that take their time", _started(_slow)),
)
