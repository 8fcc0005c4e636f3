"""Task: what carries the web: FX Gateway with a door of each kind, and nginx as two hops with TLS 1.3 between."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import processes
from benchmarks.peer_fx import FxGateway
from benchmarks.peer_nginx import Nginx, write_certificate
from benchmarks.peers import Interpose, Running, nothing_between

WEB: Final = frozenset({"get", "socket", "sni", "https", "slow"})
KINDS: Final = ("tcp", "http", "sni", "https", "https-web")
"""FX Gateway's doors. `tcp`, `sni` and `https` lead to the service as a stream, `http` and `https-web` to a relay that reads requests."""


class FxWeb:
    """One gateway with a door of each kind, one relay, and the service twice: as a stream and as HTTP."""

    name = "fx-web"
    label = "FX Gateway, web"
    measures: frozenset[str] = WEB

    def __init__(self) -> None:
        self._gateway = _Daemons(self.name, self.label, {})

    def why_not(self) -> str | None:
        """See `FxGateway`."""
        return self._gateway.why_not()

    def version(self) -> str:
        """See `FxGateway`."""
        return self._gateway.version()

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """See `FxGateway`. The doors that end TLS have the gateway's own certificate."""
        doors = {kind: processes.free_port() for kind in KINDS}
        environ = {
            "FXRELAY__SERVICE__1__NAME": "web",
            "FXRELAY__SERVICE__1__PROTOCOL": "http",
            "FXRELAY__SERVICE__1__TARGET": f"127.0.0.1:{service_port}",
        }
        for number, (kind, port) in enumerate(doors.items(), 1):
            door = f"FXGATEWAY__DOOR__{number}__"
            environ[f"{door}LISTEN"] = f"127.0.0.1:{port}"
            environ[f"{door}KIND"] = kind.removesuffix("-web")
            environ[f"{door}SERVICE"] = "web" if kind in ("http", "https-web") else "bench"
            if kind.startswith("https"):
                environ[f"{door}CERTIFICATE"], environ[f"{door}KEY"] = "server.pem", "server.key"
        self._gateway = _Daemons(self.name, self.label, environ)
        running = self._gateway.start(service_port, interpose)
        return Running(running.port, running.daemons, doors)

    def stop(self) -> None:
        """End both daemons."""
        self._gateway.stop()


class _Daemons(FxGateway):
    def wait(self, door: int, logs: Sequence[Path]) -> None:
        processes.wait_for_echo(door, self._running, logs, says=processes.SMALL_GET)


_NEAR: Final = """\
    upstream far {{ server 127.0.0.1:{far}; keepalive 64; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{near} backlog=4096;
        location / {{
            proxy_pass https://far;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        }}
    }}
"""
_FAR: Final = """\
    upstream service {{ server 127.0.0.1:{service}; keepalive 64; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{far} ssl backlog=4096;
        ssl_certificate server.pem;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
    }}
"""
_STREAM: Final = """\
    server {{
        listen 127.0.0.1:{listen} ssl backlog=4096;
        ssl_certificate server.pem;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
        proxy_pass 127.0.0.1:{target};
{onward}    }}
"""
_ONWARD: Final = """\
        proxy_ssl on;
        proxy_ssl_protocols TLSv1.3;
        proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
"""
_CONFIG: Final = """\
{load}
daemon off;
worker_processes 1;
worker_rlimit_nofile 16000;
pid {name}.pid;
error_log stderr warn;
events {{ worker_connections 8000; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_temp_path {folder}/{name}-body;
    proxy_temp_path {folder}/{name}-proxy;
    fastcgi_temp_path {folder}/{name}-fastcgi;
    uwsgi_temp_path {folder}/{name}-uwsgi;
    scgi_temp_path {folder}/{name}-scgi;
{http}}}
stream {{
    access_log off;
{stream}}}
"""


class NginxWeb(Nginx):
    """Two nginx with one worker each: as proxies of HTTP that keep their connections, and as streams that end TLS and begin it anew."""

    name = "nginx-web"
    label = "nginx, web, two hops"
    measures: frozenset[str] = frozenset({"get", "https"})

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """Start both hops."""
        self._folder = Path(tempfile.mkdtemp(prefix="fxbench-nginx-"))
        write_certificate(self._folder)
        near, far, near_tls, far_tls = (processes.free_port() for _ in range(4))
        pids = {
            "near hop": self._web_hop(
                "near", _NEAR.format(near=near, far=interpose(far)), _STREAM.format(listen=near_tls, target=far_tls, onward=_ONWARD)
            ),
            "far hop": self._web_hop(
                "far", _FAR.format(far=far, service=service_port), _STREAM.format(listen=far_tls, target=service_port, onward="")
            ),
        }
        logs = [self._folder / "near.log", self._folder / "far.log"]
        processes.wait_for_echo(near, self._running, logs, says=processes.SMALL_GET)
        return Running(near, pids, {"http": near, "https": near_tls})

    def _web_hop(self, name: str, http: str, stream: str) -> int:
        assert self._folder is not None
        config = self._folder / f"{name}.conf"
        config.write_text(_CONFIG.format(load=self._load_line(), name=name, folder=self._folder, http=http, stream=stream))
        return self._run_hop(name, config)
