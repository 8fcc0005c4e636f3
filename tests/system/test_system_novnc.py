"""A desktop in the browser: Chromium shows a node's xterm through noVNC and types into it, by every way in, across cuts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.browser import Browser, chromium
from tests.system.configured import example, issue
from tests.system.conftest import MakeStack
from tests.system.desktops import Desktop, desktop
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("browser")]

WAYS = {
    "sni": "https://desk.test:{sni}/vnc.html?",
    "https": "https://gateway.test:{https}/vnc.html?",
    "auto, TLS": "https://desk.test:{auto}/vnc.html?",
    "auto, HTTP": "http://plain.test:{auto}/vnc.html?",
    "rnode": "http://plain.test:{auto}/rnode/node-a/vnc.html?path=rnode/node-a/websockify&",
    "tcp": "http://plain.test:{tcp}/vnc.html?",
}
_PIXELS = (
    "const c = document.querySelector('#noVNC_container canvas');"
    "return c ? Array.from(c.getContext('2d').getImageData({}, {}, {}, {}).data) : [];"
)


@dataclass(frozen=True, slots=True)
class Office:
    """A node's desktop, and the ports of the doors that lead there."""

    stack: Stack
    desktop: Desktop
    ports: dict[str, int]
    certificates: dict[str, Path]


@pytest.fixture(scope="module")
def office(make_shared_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """examples/novnc as it is, with doors and services of the other kinds beside it."""
    with desktop(tmp_path_factory.mktemp("desktop")) as desk:
        stack = make_shared_stack()
        ports = {kind: free_port() for kind in ("sni", "https", "auto", "tcp")}
        home = stack.write_relay_config("node-a", {}).parent
        certificates = {"relay": issue(home, "desk"), "gateway": issue(stack.directory, "gateway")}
        more = (
            f'[[door]]\nlisten = "127.0.0.1:{ports["https"]}"\nkind = "https"\nservice = "plain"\n'
            'certificate = "gateway.pem"\nkey = "gateway.key"\n'
            f'[[door]]\nlisten = "127.0.0.1:{ports["auto"]}"\nkind = "auto"\n'
            f'[[door]]\nlisten = "127.0.0.1:{ports["tcp"]}"\nservice = "raw"\n'
            '[[route]]\nhost = "plain.test"\nservice = "plain"\n'
        )
        pool = (
            f'[[service]]\nname = "plain"\nprotocol = "http"\nport = {desk.port}\nhost = "127.0.0.1"\nnode_paths = true\n'
            f'[[service]]\nname = "raw"\nprotocol = "tcp"\ntarget = "127.0.0.1:{desk.port}"\n'
            f'[cluster]\nstore = "sqlite:{home}/cluster.db"\n'
        )
        example(stack, "novnc", {"0.0.0.0:443": f"127.0.0.1:{ports['sni']}", "desk.example.com": "desk.test"}, more)
        example(stack, "novnc", {"127.0.0.1:6080": f"127.0.0.1:{desk.port}", "desk.example.com": "desk.test"}, pool, relay="node-a")
        stack.start_gateway()
        stack.start_relay("node-a")
        yield Office(stack, desk, ports, certificates)
        stack.stop()


@pytest.fixture(scope="module")
def browser(office: Office) -> Iterator[Browser]:
    with chromium(list(office.certificates.values())) as window:
        yield window


@pytest.fixture(scope="module")
def beside(office: Office) -> Iterator[Browser]:
    """Somebody who sits at the same screen, without a gateway."""
    with chromium() as window:
        connect(window, f"http://127.0.0.1:{office.desktop.port}/vnc.html?")
        yield window


def connect(browser: Browser, url: str) -> None:
    """Show the desktop, and put the keyboard into it."""
    browser.open(f"{url}autoconnect=1&resize=off&show_dot=0&quality=9")
    browser.wait("document.documentElement.classList.contains('noVNC_connected')")
    browser.wait("document.querySelector('#noVNC_container canvas')?.width == 640")
    browser.wait("document.querySelector('#noVNC_container').getBoundingClientRect().height > 100")
    browser.click(450, 300)


def has_background(browser: Browser, colour: tuple[int, int, int]) -> bool:
    """Whether a piece of the xterm that has no text is of this colour, to the eye."""
    found = browser.run(_PIXELS.format(500, 370, 10, 10))
    return len(found) == 400 and all(abs(value - colour[at % 4]) < 8 for at, value in enumerate(found) if at % 4 != 3)


def picture(browser: Browser) -> str:
    """The digest of what the page shows of the screen."""
    return hashlib.sha256(browser.run("return document.querySelector('#noVNC_container canvas').toDataURL();").encode()).hexdigest()


def work(browser: Browser, desk: Desktop, word: str, colour: tuple[int, int, int]) -> None:
    """Type a command: its file must be there, and its colour on the screen."""
    file = desk.home / word
    red, green, blue = colour
    browser.type(f"clear; printf '\\033]11;#{red:02x}{green:02x}{blue:02x}\\007'; seq 1 20; echo typed-{word} > {word}\n")
    wait_until(lambda: file.exists() and file.read_text() == f"typed-{word}\n", what=f"{word}, which was typed")
    wait_until(lambda: has_background(browser, colour), what="the colour that was asked for")


@pytest.mark.parametrize("way", WAYS)
def test_a_desktop_is_seen_and_typed_into_across_a_cut(office: Office, browser: Browser, beside: Browser, way: str) -> None:
    desk, number = office.desktop, list(WAYS).index(way)
    before = desk.visits
    connect(browser, WAYS[way].format(**office.ports))
    work(browser, desk, f"a{number}", (250, 250 - 20 * number, 20 * number))
    browser.type("for i in $(seq 300); do echo $i; sleep 0.001; done; touch done\n")
    for _ in range(3):
        wait_until(lambda: office.stack.cutter.cut() >= 1, what="a tunnel to cut")
    wait_until((desk.home / "done").exists, what="the end of much output")
    (desk.home / "done").unlink()
    work(browser, desk, f"b{number}", (20 * number, 250, 250 - 20 * number))
    assert desk.visits == before + 1  # the same session all the time
    assert browser.run("return document.documentElement.classList.contains('noVNC_connected')")
    wait_until(lambda: picture(browser) == picture(beside), what="the same picture as without us")


def test_only_the_key_of_whom_it_came_for_is_seen(office: Office) -> None:
    with chromium([office.certificates["relay"]]) as window:
        window.open(WAYS["sni"].format(**office.ports))
        assert window.run("return document.title") == "noVNC"
        window.open(WAYS["https"].format(**office.ports))
        assert "ERR_CERT_AUTHORITY_INVALID" in window.run("return document.body.innerText")
