"""Terminals and windows in the browser that are not noVNC: shellinabox, which polls for long, and xpra, one port for three protocols."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.browser import Browser, chromium
from tests.system.conftest import MakeStack
from tests.system.desktops import shellinabox, xpra
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as window:
        yield window


def stack_for(make_stack: MakeStack, port: int) -> tuple[Stack, int]:
    """A door of kind auto to an HTTP service at `port`."""
    door = free_port()
    stack = make_stack(extra=f'[[door]]\nlisten = "127.0.0.1:{door}"\nkind = "auto"\n[[route]]\nhost = "*.test"\nservice = "page"\n')
    stack.start_gateway()
    stack.start_relay("a", {}, extra=f'[[service]]\nname = "page"\nprotocol = "http"\ntarget = "127.0.0.1:{port}"\n')
    return stack, door


def written(file: Path, text: str) -> None:
    wait_until(lambda: file.exists() and file.read_text() == text, what=f"{file.name}, which was typed")


def test_long_polls_go_on_across_cuts(make_stack: MakeStack, browser: Browser, tmp_path: Path) -> None:
    with shellinabox(tmp_path) as port:
        stack, door = stack_for(make_stack, port)
        browser.open(f"http://shell.test:{door}/")
        screen = "(document.querySelector('#console')?.innerText ?? '')"
        browser.wait(f"/[#$]/.test({screen})")
        browser.click(300, 200)
        browser.type("echo $((6*7)) > one; seq -s, 1 9\n")
        written(tmp_path / "one", "42\n")
        browser.wait(f"{screen}.includes('1,2,3,4,5,6,7,8,9')")
        for number in range(2):  # with nobody typing, the page's request waits: it is cut within
            wait_until(lambda: stack.cutter.cut() >= 1, what="a tunnel to cut")
            browser.type(f"echo {number} > again{number}; echo said $(({number}+70))\n")
            written(tmp_path / f"again{number}", f"{number}\n")
            browser.wait(f"{screen}.includes('said {number + 70}')")


def test_a_window_of_xpra_is_typed_into_across_a_cut(make_stack: MakeStack, browser: Browser, tmp_path: Path) -> None:
    with xpra(tmp_path) as port:
        stack, door = stack_for(make_stack, port)
        browser.open(f"http://windows.test:{door}/index.html?sound=false&clipboard=false&keyboard_layout=us")
        browser.wait("document.querySelector('.window canvas, div.window')", 60)
        browser.click_on("document.querySelector('.window canvas')")
        browser.type("echo $((6*7)) > one\n")
        written(tmp_path / "one", "42\n")
        wait_until(lambda: stack.cutter.cut() >= 1, what="a tunnel to cut")
        browser.type("echo $((7*7)) > two\n")
        written(tmp_path / "two", "49\n")
