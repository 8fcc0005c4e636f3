"""What curl, wget and Python's clients are used to: each habit gives the same with gateway and relay between as without."""

import contextlib
import hashlib
import http.client
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.conftest import MakeStack
from tests.system.peers import dial, read_to_end
from tests.system.servers import need, nginx_server, random_file

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("web")]
MIB = 1 << 20

NGINX = """absolute_redirect off; client_max_body_size 0; keepalive_timeout 30;
location /up/ { dav_methods PUT DELETE; create_full_put_path on; }
location /little/ { client_max_body_size 1k; dav_methods PUT; }
location /packed/ { alias FILES/; gzip on; gzip_types *; gzip_min_length 1; }
location /old/ { alias FILES/; gzip on; gzip_types *; chunked_transfer_encoding off; }
location /moved { return 302 /small; }
location /secret { auth_basic "who"; auth_basic_user_file FILES/users; alias FILES/small; }
"""
WAYS = ("relay", "gateway", "both")
"""Who reads HTTP: the relay, a door of the gateway, or one after the other."""


@dataclass(frozen=True, slots=True)
class Site:
    """The same nginx at several ports; `direct` is its own."""

    ports: dict[str, int]
    files: Path
    work: Path


@pytest.fixture(scope="module")
def site(make_shared_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need("nginx", "curl", "wget")
    home = tmp_path_factory.mktemp("habits")
    with nginx_server(home / "n", NGINX.replace("FILES", str(home / "n" / "files"))) as (port, files):
        (files / "small").write_text("hello")
        (files / "empty").write_text("")
        (files / "users").write_text("anna:{PLAIN}secret\n")
        random_file(files / "large", 4 * MIB)
        door_ports = {name: free_port() for name in ("gateway", "both")}
        services = {"gateway": "raw", "both": "web"}
        stack = make_shared_stack(
            "web",
            extra="".join(
                f'[[door]]\nlisten = "127.0.0.1:{door_ports[name]}"\nkind = "http"\nservice = "{services[name]}"\n' for name in door_ports
            ),
        )
        stack.start_gateway()
        web = f'[[service]]\nname = "web"\nprotocol = "http"\ntarget = "127.0.0.1:{port}"\n'
        stack.start_relay("a", {"raw": f"127.0.0.1:{port}"}, extra=web)
        yield Site({"direct": port, "relay": stack.doors["web"], **door_ports}, files, home)


CURL = ("curl", "-sS", "--max-time", "30", "-w", r"\n%{http_code} %{http_version} %{num_connects} %{size_download} %{size_upload}\n")
COMMANDS: dict[str, tuple[str, ...]] = {
    "three requests, one connection": (*CURL, "{at}/small", "{at}/empty", "{at}/nothing"),
    "HEAD": (*CURL, "-I", "{at}/small", "-I", "{at}/large"),
    "HTTP/1.0": (*CURL, "-0", "{at}/small", "{at}/packed/small"),
    "HTTP/1.0 that asks to be kept": (*CURL, "-0", "-H", "Connection: keep-alive", "{at}/small", "{at}/small"),
    "connection close": (*CURL, "-H", "Connection: close", "{at}/small", "{at}/small"),
    "a range": (*CURL, "-r", "1-3", "{at}/small"),
    "the end": (*CURL, "-r", "-2", "{at}/small"),
    "several ranges": (*CURL, "-r", "0-0,2-2", "{at}/small"),
    "a range that is not there": (*CURL, "-r", "9-", "{at}/small"),
    "compressed, in chunks": (*CURL, "--compressed", "{at}/packed/small", "{at}/packed/large"),
    "compressed, until the end": (*CURL, "--compressed", "{at}/old/small", "{at}/old/small"),
    "redirected": (*CURL, "-L", "{at}/moved"),
    "turned away, then named": (*CURL, "--anyauth", "-u", "anna:secret", "{at}/secret"),
    "PUT with a length": (*CURL, "-T", "{large}", "{at}/up/put"),
    "PUT in chunks": (*CURL, "-T", "-", "{at}/up/chunks"),
    "PUT that expects 100": (*CURL, "-H", "Expect: 100-continue", "--expect100-timeout", "20", "-T", "{large}", "{at}/up/expects"),
    "PUT that is too large": (*CURL, "-H", "Expect: 100-continue", "--expect100-timeout", "20", "-T", "{large}", "{at}/little/x"),
    "POST where none is taken": (*CURL, "-d", "a=b", "{at}/small", "{at}/small"),
    "an empty POST": (*CURL, "-X", "POST", "-H", "Content-Length: 0", "{at}/small"),
    "OPTIONS": (*CURL, "-X", "OPTIONS", "{at}/small"),
    "an unknown method": (*CURL, "-X", "PURGE", "{at}/small"),
    "DELETE": (*CURL, "-X", "DELETE", "{at}/up/put"),
    "a query, and dots": (*CURL, "--path-as-is", "{at}/up/../small?a=b&c=%20d"),
    "wget": ("wget", "-q", "-O", "-", "{at}/small", "{at}/packed/small"),
    "wget goes on": ("sh", "-c", "head -c 100000 {large} > {part}; wget -q -c -O {part} {at}/large; sha256sum < {part}"),
    "wget looks first": ("wget", "-q", "--spider", "-S", "{at}/small"),
    "wget posts": ("wget", "-q", "--content-on-error", "-O", "-", "--post-data=x=y", "{at}/small"),
    "wget is told who": ("wget", "-q", "-O", "-", "--user=anna", "--password=secret", "{at}/secret"),
}
_VARIES = ("Date:", "Server:", "ETag:", "Last-Modified:", "Connection:", "Keep-Alive:")


def outcome(site: Site, name: str, way: str) -> tuple[int, str, str, list[str]]:
    """Exit code, digest of the output, its last lines, and what was said on standard error."""
    part = site.work / "part"
    values = {"{at}": f"http://127.0.0.1:{site.ports[way]}", "{large}": str(site.files / "large"), "{part}": str(part)}
    words = list(COMMANDS[name])
    for mark, value in values.items():
        words = [word.replace(mark, value) for word in words]
    with (site.files / "large").open("rb") as body:
        done = subprocess.run(words, stdin=body, capture_output=True, timeout=60, check=False)
    port = str(site.ports[way]).encode()
    lines = re.sub(rb"0000\d{16}", b"BOUNDARY", done.stdout.replace(port, b"PORT")).splitlines()
    output = b"\n".join(line for line in lines if not line.startswith(tuple(map(str.encode, _VARIES))))
    errors = [line.strip() for line in done.stderr.decode().replace(port.decode(), "PORT").splitlines()]
    return (
        done.returncode,
        hashlib.sha256(output).hexdigest(),
        output[-300:].decode("latin-1"),
        [line for line in errors if not line.startswith(_VARIES)],
    )


def talk(port: int, *pieces: bytes) -> bytes:
    """What the server says to these bytes until it closes, each piece sent when the one before has been answered with something."""
    with dial(port, 20) as client:
        heard = b""
        for at, piece in enumerate(pieces):
            client.sendall(piece)
            if at < len(pieces) - 1:
                heard += client.recv(65_536)
        return heard + read_to_end(client)


def session(site: Site, port: int) -> object:
    """One connection of http.client for everything, as requests and its like keep it."""
    seen = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection), (site.files / "large").open("rb") as file:
        connection.connect()
        sock = connection.sock
        requests: list[tuple[str, str, object, dict[str, str]]] = [
            ("GET", "/small", None, {}),
            ("HEAD", "/large", None, {}),
            ("PUT", "/up/put", file, {}),
            ("GET", "/large", None, {"Range": "bytes=5-9"}),
            ("PUT", "/up/chunks", (b"piece %d" % number for number in range(500)), {}),
            ("POST", "/small", b"x" * 100_000, {"Content-Type": "text/plain"}),
            ("GET", "/small", None, {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}),
            ("GET", "/packed/small", None, {"Accept-Encoding": "gzip"}),
        ]
        for method, path, body, headers in requests:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = hashlib.sha256(answer.read()).hexdigest()
            kept = ("Content-Length", "Content-Type", "Content-Range", "Accept-Ranges", "Transfer-Encoding", "Content-Encoding", "Allow")
            seen.append((answer.status, answer.reason, found, [answer.getheader(name) for name in kept], connection.sock is sock))
            if method == "POST":  # answered before all of it was there: the relay says `Connection: close`, nginx drops the rest
                seen[-1] = seen[-1][:-1]
                connection.close()
                connection.connect()
                sock = connection.sock
    for made in ("put", "chunks"):
        seen.append(hashlib.sha256((site.files / "up" / made).read_bytes()).hexdigest())
        (site.files / "up" / made).unlink()
    return seen


def opened(site: Site, port: int) -> object:
    """urllib: a connection for each request, redirects followed, errors raised."""
    at, seen = f"http://127.0.0.1:{port}", []
    for url, data in (
        (f"{at}/small", None),
        (f"{at}/large", None),
        (f"{at}/nothing", None),
        (f"{at}/small", b"a=b"),
        (f"{at}/secret", None),
    ):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as answer:
                seen.append((answer.status, hashlib.sha256(answer.read()).hexdigest()))
        except urllib.error.HTTPError as error:
            seen.append((error.code, hashlib.sha256(error.read()).hexdigest()))
            error.close()
    return seen


def expecting(site: Site, port: int) -> object:
    """Waits for 100 before it sends anything of the body."""
    head = b"PUT /up/put HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    heard = talk(port, head, b"hello")
    (site.files / "up" / "put").unlink()
    return heard.split(b"\r\n")[0], b"HTTP/1.1 201" in heard


def pipelined(site: Site, port: int) -> object:
    """Does not wait for answers."""
    get = b"GET /%b HTTP/1.1\r\nHost: a\r\n%b\r\n"
    heard = talk(port, get % (b"small", b"") * 3 + get % (b"nothing", b"") + get % (b"small", b"Connection: close\r\n"))
    return [heard.count(word) for word in (b"HTTP/1.1 200", b"HTTP/1.1 404", b"hello")], heard.endswith(b"hello")


def old(site: Site, port: int) -> object:
    """HTTP/1.0 by hand, without Host."""
    heard = talk(port, b"GET /packed/small HTTP/1.0\r\n\r\n")
    return heard.split(b" ")[1], hashlib.sha256(heard.partition(b"\r\n\r\n")[2]).hexdigest()


def gives_up(site: Site, port: int) -> object:
    """Leaves in the middle of a download, and of an upload: the next client is served."""
    with dial(port, 20) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        client.recv(1000)
    with dial(port, 20) as client:
        client.sendall(b"PUT /up/half HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nhalf")
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # the relay says in this way that something is missing
            assert client.recv(1000) == b""
    return (site.files / "up" / "half").exists(), opened(site, port)


PYTHON: tuple[Callable[[Site, int], object], ...] = (session, opened, expecting, pipelined, old, gives_up)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gives_the_same(site: Site, name: str) -> None:
    found = {}
    for way in ("direct", *WAYS):
        (site.files / "up").mkdir(exist_ok=True)
        for made in (site.files / "up").iterdir():
            made.unlink()
        if "DELETE" in COMMANDS[name]:
            (site.files / "up" / "put").write_text("to be deleted")
        found[way] = (*outcome(site, name, way), [path.name for path in (site.files / "up").iterdir()])
        for made in (site.files / "up").iterdir():
            assert made.read_bytes() == (site.files / "large").read_bytes()
    assert found == dict.fromkeys(found, found["direct"])


@pytest.mark.parametrize("habit", PYTHON, ids=lambda habit: habit.__name__)
def test_a_habit_of_python_gives_the_same(site: Site, habit: Callable[[Site, int], object]) -> None:
    (site.files / "up").mkdir(exist_ok=True)
    found = {way: habit(site, site.ports[way]) for way in ("direct", *WAYS)}
    assert found == dict.fromkeys(found, found["direct"])
