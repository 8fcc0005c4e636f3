"""Task: nginx as two hops with TLS 1.3 AES-256-GCM between: what a good static proxy pair costs. It is no reverse tunnel."""

import datetime
import ipaddress
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks import processes
from benchmarks.peers import STREAMS, Interpose, Running, nothing_between

_MODULE: Final = "ngx_stream_module.so"

_CONFIG: Final = """\
{load}
daemon off;
worker_processes 1;
worker_rlimit_nofile 16000;
pid {name}.pid;
error_log stderr warn;
events {{ worker_connections 15000; }}
stream {{
    access_log off;
    proxy_timeout 1h;
    server {{
        listen 127.0.0.1:{listen}{tls_in} backlog=4096;
        proxy_pass 127.0.0.1:{target};
{tls}    }}
}}
"""
_TLS_OUT: Final = """\
        proxy_ssl on;
        proxy_ssl_protocols TLSv1.3;
        proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        proxy_ssl_session_reuse on;
"""
_TLS_IN: Final = """\
        ssl_certificate server.pem;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        ssl_session_cache shared:bench:1m;
"""


class Nginx:
    """Two nginx with one worker each: plain in and TLS out, then TLS in and plain out."""

    name = "nginx"
    label = "nginx stream, two hops"
    measures: frozenset[str] = STREAMS

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def why_not(self) -> str | None:
        """Needs nginx with its stream module."""
        if not self._program():
            return "no nginx: apt-get install nginx-light libnginx-mod-stream"
        if self._load_line() is None:
            return "nginx has no stream module: apt-get install libnginx-mod-stream"
        return None

    def version(self) -> str:
        """As `nginx -v` says it."""
        return self._build().splitlines()[0].removeprefix("nginx version: ")

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """Start both hops. Both run as the caller; no file outside a temporary folder is touched."""
        self._folder = Path(tempfile.mkdtemp(prefix="fxbench-nginx-"))
        door, tunnel = processes.free_port(), processes.free_port()
        write_certificate(self._folder)
        near = self._hop("near", door, interpose(tunnel), tls_in="", tls=_TLS_OUT)
        far = self._hop("far", tunnel, service_port, tls_in=" ssl", tls=_TLS_IN)
        processes.wait_for_echo(door, self._running, [self._folder / "near.log", self._folder / "far.log"])
        return Running(door, {"near hop": near, "far hop": far})

    def stop(self) -> None:
        """End both hops with their workers."""
        processes.stop(self._running)
        self._running = []
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _hop(self, name: str, listen: int, target: int, *, tls_in: str, tls: str) -> int:
        assert self._folder is not None
        config = self._folder / f"{name}.conf"
        load = self._load_line()
        config.write_text(_CONFIG.format(load=load, name=name, listen=listen, tls_in=tls_in, target=target, tls=tls))
        return self._run_hop(name, config)

    def _run_hop(self, name: str, config: Path) -> int:
        assert self._folder is not None
        command = [self._program() or "nginx", "-e", "stderr", "-p", str(self._folder), "-c", str(config)]
        process = processes.start(command, self._folder / f"{name}.log")
        self._running.append(process)
        return process.pid

    def _program(self) -> str | None:
        return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

    def _build(self) -> str:
        program = self._program() or "nginx"
        return subprocess.run([program, "-V"], capture_output=True, text=True, timeout=10, check=False).stderr

    def _load_line(self) -> str | None:
        build = self._build()
        if re.search(r"--with-stream(?!=dynamic)(?!_)", build):
            return ""
        folder = re.search(r"--modules-path=(\S+)", build)
        module = Path(folder[1] if folder else "/usr/lib/nginx/modules") / _MODULE
        return f"load_module {module};" if module.exists() else None


def write_certificate(folder: Path) -> None:
    """server.pem and server.key for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").touch(mode=0o600)
    (folder / "server.key").write_bytes(private)
