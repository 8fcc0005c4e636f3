"""HTTP services through gateway and relay, with nginx behind them and the clients that people use."""

import hashlib
import http.client
import os
import subprocess
import urllib.request

import pytest

from tests.system.servers import file_digest, need, nginx_server, random_file
from tests.system.stack import Stack

pytestmark = pytest.mark.system
MIB = 1 << 20
BULK_BYTES = int(os.environ.get("FX_BULK_MIB", "256")) * MIB
BULK_S = 60 + BULK_BYTES // (8 * MIB)
UPLOADS = "client_max_body_size 0; location /up/ { dav_methods PUT; create_full_put_path on; }"


def http_service(name: str, target: str, extra: str = "") -> str:
    return f'[[service]]\nname = "{name}"\nprotocol = "http"\ntarget = "{target}"\n{extra}\n'


@pytest.fixture(scope="module")
def web(make_shared_stack, tmp_path_factory):
    """A stack with nginx as its service `web`; the door's port and nginx's files."""
    home = tmp_path_factory.mktemp("nginx")
    with nginx_server(home / "n", UPLOADS) as (port, files):
        (files / "small").write_text("hello")
        (files / "ranges").write_bytes(bytes(range(256)) * 4096)
        stack: Stack = make_shared_stack("web")
        stack.start_gateway()
        stack.start_relay("a", {}, extra=http_service("web", f"127.0.0.1:{port}") + "[log]\naccess = true\n")
        yield stack, stack.doors["web"], files


def test_requests_of_one_connection(web):
    _, port, _ = web
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for method, status, body in (("GET", 200, b"hello"), ("HEAD", 200, b""), ("GET", 200, b"hello")):
        connection.request(method, "/small")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, body)
        assert answer.getheader("Content-Length") == "5"
    connection.request("GET", "/nothing-there")
    answer = connection.getresponse()
    assert answer.status == 404
    assert b"nginx" in answer.read()
    connection.request("GET", "/ranges", headers={"Range": "bytes=250-259"})
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (206, bytes((250, 251, 252, 253, 254, 255, 0, 1, 2, 3)))
    connection.close()


def test_bulk_both_ways(web):
    _, port, files = web
    digest = random_file(files / "large", BULK_BYTES)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/large", timeout=60) as answer:
        found = hashlib.sha256()
        while block := answer.read(1 << 20):
            found.update(block)
    assert found.hexdigest() == digest
    need("curl")
    curl = ["curl", "-sS", "--max-time", str(BULK_S), "-o", "/dev/null", "-w", "%{http_code}"]
    sent = subprocess.run([*curl, "-T", str(files / "large"), f"http://127.0.0.1:{port}/up/again"], capture_output=True, text=True)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, "201", "")
    assert file_digest(files / "up" / "again") == digest
    digest = random_file(files / "smaller", 32 * MIB)
    with (files / "smaller").open("rb") as body:
        sent = subprocess.run([*curl, "-T", "-", f"http://127.0.0.1:{port}/up/chunked"], stdin=body, capture_output=True, text=True)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, "201", "")
    assert file_digest(files / "up" / "chunked") == digest
    for name in ("large", "smaller", "up/again", "up/chunked"):
        (files / name).unlink()
