"""Doors that lead by name, with real servers behind a relay: nginx with TLS of its own, plain nginx, sshd, and one that speaks first."""

import hashlib
import http.client
import json
import shlex
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.ports import free_port
from tests.system.conftest import MakeStack
from tests.system.peers import Service, dial, echo, read_exactly
from tests.system.servers import Ssh, file_digest, need, nginx_server, program, random_file, running, ssh_server
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("web")]
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """One port for everything, and the authorities of the certificates that only nginx and only the gateway have."""

    stack: Stack
    port: int
    secure_port: int
    nginx_authority: trustme.CA
    gateway_authority: trustme.CA
    files: Path
    ssh: Ssh


def greets(sock: socket.socket) -> None:
    sock.sendall(b"RFB 003.008\n")
    echo(sock)


@pytest.fixture(scope="module")
def site(make_shared_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need("nginx", "sshd")
    home = tmp_path_factory.mktemp("site")
    authorities = {"nginx": trustme.CA(), "gateway": trustme.CA()}
    for who, authority in authorities.items():
        certificate = authority.issue_cert("secure.test")
        certificate.private_key_pem.write_to_path(str(home / f"{who}.key"))
        (home / f"{who}.key").chmod(0o600)
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(str(home / f"{who}.pem"), append=True)
    port, tls_port, secure_port = free_port(), free_port(), free_port()
    vnc = Service(greets)
    with nginx_server(home / "plain") as (plain_port, files), ssh_server(home / "ssh") as ssh:
        (home / "tls.conf").write_text(
            f"daemon off;\npid {home}/tls.pid;\nerror_log {home}/tls.log;\nevents {{}}\n"
            f"stream {{ server {{ listen 127.0.0.1:{tls_port} ssl; ssl_certificate {home}/nginx.pem; ssl_certificate_key {home}/nginx.key; "
            f"proxy_pass 127.0.0.1:{plain_port}; }} }}\n"
        )
        module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
        if module.exists():
            (home / "tls.conf").write_text(f"load_module {module};\n" + (home / "tls.conf").read_text())
        arguments = [program("nginx"), "-p", str(home), "-c", str(home / "tls.conf"), "-e", str(home / "tls.log")]
        with running(arguments, tls_port, home / "tls-nginx.log"):
            stack = make_shared_stack(
                extra=f'[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "auto"\nservice = "vnc"\n'
                'ssh = "ssh"\nstreams = ["ssh", "vnc", "away"]\n'
                f'[[door]]\nlisten = "127.0.0.1:{secure_port}"\nkind = "https"\nservice = "plain"\n'
                f'certificate = "{home}/gateway.pem"\nkey = "{home}/gateway.key"\n[log]\naccess = "{home}/access.log"\n'
                '[[route]]\nhost = "secure.test"\nservice = "tls"\n'
                '[[route]]\nhost = "plain.test"\nservice = "plain"\n'
                '[[route]]\nhost = "away.test"\nservice = "away"\n'
            )
            stack.start_gateway()
            targets = {"tls": tls_port, "plain": plain_port, "ssh": ssh.port}
            services = {name: f"127.0.0.1:{target}" for name, target in targets.items()} | {"vnc": vnc.target}
            stack.start_relay("node-a", services)
            yield Site(stack, port, secure_port, authorities["nginx"], authorities["gateway"], files, ssh)
            stack.stop()
    vnc.close()


def fetched(authority: trustme.CA, port: int, path: str, host: str) -> str:
    """The digest of a file of nginx's, fetched over TLS by somebody who believes this authority only."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with dial(port) as sock, context.wrap_socket(sock, server_hostname="secure.test") as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == 200
        found = hashlib.sha256()
        while block := response.read(1 << 18):
            found.update(block)
        client.unwrap()
    return found.hexdigest()


def test_tls_ends_at_the_service_and_nowhere_else(site: Site) -> None:
    assert random_file(site.files / "large", 64 * MIB) == fetched(site.nginx_authority, site.port, "/large", "secure.test")


def test_a_name_without_a_route_is_led_to_the_default(site: Site) -> None:
    context = ssl.create_default_context()
    with dial(site.port) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname="nobody.test")  # the service of the door is no TLS server


def test_tls_that_ends_at_the_gateway(site: Site) -> None:
    assert random_file(site.files / "through", 64 * MIB) == fetched(site.gateway_authority, site.secure_port, "/through", "elsewhere.test")
    log = site.files.parent.parent / "access.log"
    wait_until(lambda: "elsewhere.test" in log.read_text(), 20, "the access log")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    record = next(record for record in records if record["host"] == "elsewhere.test")
    assert (record["service"], record["end"], record["bytes_out"] > 64 * MIB) == ("plain", "closed", True)


def test_plain_http_at_the_same_port(site: Site) -> None:
    digest = random_file(site.files / "small", 8 * MIB)
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    for _ in range(3):  # one connection, kept
        connection.request("GET", "/small", headers={"Host": "plain.test"})
        assert hashlib.sha256(connection.getresponse().read()).hexdigest() == digest
    connection.close()


def test_a_service_that_nobody_offers_is_a_page(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    connection.request("GET", "/", headers={"Host": "away.test"})
    response = connection.getresponse()
    page = response.read().decode()
    assert (response.status, int(response.headers["Retry-After"]) > 0) == (503, True)
    trace = page.partition("trace ")[2][:9]
    connection.close()
    assert trace
    wait_until(lambda: trace in site.stack.logs(), what="its trace in the log")


def test_ssh_at_the_same_port(site: Site, tmp_path: Path) -> None:
    digest = random_file(tmp_path / "up", 8 * MIB)
    target = site.ssh.home / "up"
    command = [program("scp"), "-q", *site.ssh.options(site.port), str(tmp_path / "up"), f"{site.ssh.login}:{target}"]
    subprocess.run(command, check=True, timeout=60)
    assert file_digest(target) == digest


def connect_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fxgateway.cli", "connect", *words]


@pytest.mark.parametrize("direct", ["dead", "alive"])
def test_ssh_by_a_proxy_command(site: Site, tmp_path: Path, direct: str) -> None:
    digest = random_file(tmp_path / "up", 8 * MIB)
    target = site.ssh.home / "by-command"
    target.unlink(missing_ok=True)
    address = f"127.0.0.1:{site.ssh.port if direct == 'alive' else free_port()}"
    command = shlex.join(connect_command("ssh", "--via", f"http://127.0.0.1:{site.port}", "--direct", address))
    scp = [program("scp"), "-q", "-o", f"ProxyCommand={command}", *site.ssh.options(1), str(tmp_path / "up"), f"{site.ssh.login}:{target}"]
    subprocess.run(scp, check=True, timeout=60)
    assert file_digest(target) == digest


def test_a_local_port(site: Site) -> None:
    with subprocess.Popen(
        connect_command("vnc", "--via", f"http://127.0.0.1:{site.port}", "--listen", "127.0.0.1:0"), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[3].rpartition(":")[2])
            for _ in range(3):
                with dial(port) as client:
                    assert read_exactly(client, 12) == b"RFB 003.008\n"
                    client.sendall(b"there")
                    assert read_exactly(client, 5) == b"there"
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
        finally:
            process.terminate()


@pytest.mark.parametrize("node", ["node-a", "node-z"])
def test_a_relay_can_be_asked_for_by_its_name(site: Site, node: str) -> None:
    """Also for a service at one address: `ssh HOST` with `--node %h` in the ProxyCommand."""
    command = connect_command("vnc", "--node", node, "--via", f"http://127.0.0.1:{site.port}")
    done = subprocess.run(command, input=b"RFB 003.008\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout[:12]) == ((0, b"RFB 003.008\n") if node == "node-a" else (1, b"")), done.stderr


@pytest.mark.parametrize(
    ("service", "words"), [("tls", "does not give out this stream"), ("away", "no relay offers it"), ("ssh --node node-z", "502")]
)
def test_a_stream_that_cannot_be_had(site: Site, service: str, words: str) -> None:
    command = connect_command(*service.split(), "--via", f"http://127.0.0.1:{site.port}")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert words in done.stderr or "no relay" in done.stderr


def test_a_server_that_speaks_first_at_the_same_port(site: Site) -> None:
    with dial(site.port) as client:
        assert read_exactly(client, 12) == b"RFB 003.008\n"
        client.sendall(b"RFB 003.008\n")
        assert read_exactly(client, 12) == b"RFB 003.008\n"


def test_a_crowd_that_does_not_say_what_it_wants(site: Site) -> None:
    crowd = [dial(site.port, source=f"127.0.3.{number % 100 + 1}") for number in range(300)]
    for number, sock in enumerate(crowd):
        sock.sendall((b"\x16\x03\x01", b"GET", b"GET / HTTP/1.1\r\n")[number % 3])
    test_plain_http_at_the_same_port(site)
    for sock in crowd:
        sock.close()
