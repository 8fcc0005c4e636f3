"""varnishtest's client and server around the whole way: smuggling shapes, and what a proxy must do with the rest."""

import subprocess
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.servers import need, program

pytestmark = pytest.mark.system

CASES = {
    "keep-alive, chunks both ways, HEAD and 204": """
server s1 -listen "127.0.0.1:${backend}" {
    rxreq
    expect req.http.host == "site"
    expect req.http.x-forwarded-for == "127.0.0.1"
    expect req.body == "abcdef"
    txresp -nolen -hdr "Transfer-Encoding: chunked"
    chunked "one"
    chunked "two"
    chunkedlen 0
    rxreq
    expect req.method == "HEAD"
    txresp -nolen -hdr "Content-Length: 9"
    rxreq
    txresp -status 204 -nolen
    rxreq
    txresp -body "last"
} -start
client c1 -connect "127.0.0.1:${door}" {
    txreq -method POST -hdr "Host: site" -nolen -hdr "Transfer-Encoding: chunked"
    chunked "abc"
    chunked "def"
    chunkedlen 0
    rxresp
    expect resp.status == 200
    expect resp.body == "onetwo"
    txreq -method HEAD -hdr "Host: site"
    rxresphdrs
    expect resp.http.content-length == "9"
    txreq -hdr "Host: site"
    rxresphdrs
    expect resp.status == 204
    expect resp.http.content-length == <undef>
    txreq -hdr "Host: site"
    rxresp
    expect resp.body == "last"
} -run
""",
    "two statements of length": """
client c1 -connect "127.0.0.1:${door}" {
    send "POST / HTTP/1.1\\r\\nHost: site\\r\\nContent-Length: 5\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\n"
    send "GET /smuggled HTTP/1.1\\r\\nHost: site\\r\\n\\r\\n"
    rxresp
    expect resp.status == 400
    expect_close
} -run
""",
    "an obfuscated transfer encoding": """
client c1 -connect "127.0.0.1:${door}" {
    send "POST / HTTP/1.1\\r\\nHost: site\\r\\nTransfer-Encoding: \\tchunked, identity\\r\\n\\r\\n0\\r\\n\\r\\n"
    rxresp
    expect resp.status == 501
    expect_close
} -run
client c2 -connect "127.0.0.1:${door}" {
    send "POST / HTTP/1.1\\r\\nHost: site\\r\\nTransfer-Encoding\\x0b: chunked\\r\\n\\r\\n0\\r\\n\\r\\n"
    rxresp
    expect resp.status == 400
    expect_close
} -run
""",
    "a response that ends too early": """
server s1 -listen "127.0.0.1:${backend}" {
    rxreq
    txresp -nolen -hdr "Content-Length: 100" -body "half"
} -start
client c1 -connect "127.0.0.1:${door}" {
    txreq -hdr "Host: site"
    rxresphdrs
    expect resp.status == 200
} -run
""",
    "a response with two lengths": """
server s1 -listen "127.0.0.1:${backend}" {
    rxreq
    txresp -nolen -hdr "Content-Length: 4" -hdr "Content-Length: 5" -body "half"
} -start
client c1 -connect "127.0.0.1:${door}" {
    txreq -hdr "Host: site"
    rxresp
    expect resp.status == 502
} -run
""",
}


@pytest.fixture(scope="module")
def site(make_shared_stack):
    need("varnishtest")
    backend = free_port()
    stack = make_shared_stack("site")
    stack.start_gateway()
    stack.start_relay("a", {}, extra=f'[[service]]\nname = "site"\nprotocol = "http"\ntarget = "127.0.0.1:{backend}"\n')
    return backend, stack.doors["site"]


@pytest.mark.parametrize("name", CASES)
def test_case(site: tuple[int, int], name: str, tmp_path: Path) -> None:
    backend, door = site
    case = tmp_path / "case.vtc"
    case.write_text(f'vtest "{name}"\n{CASES[name]}')
    done = subprocess.run(
        [program("varnishtest"), "-t", "20", f"-Dbackend={backend}", f"-Ddoor={door}", str(case)],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
