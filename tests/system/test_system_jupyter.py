"""Jupyter in the browser: Chromium logs in, runs cells over a WebSocket, and does not notice that the tunnel is cut."""

import json
from collections.abc import Iterator

import pytest

from tests.ports import free_port
from tests.system.browser import ENTER, SHIFT, Browser, chromium
from tests.system.configured import example, issue
from tests.system.conftest import MakeStack
from tests.system.desktops import Jupyter, jupyter
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("browser")]

_CELLS = "document.querySelectorAll('.code_cell .CodeMirror, .jp-CodeCell .cm-content')"
_READY = (
    "window.Jupyter ? Jupyter.notebook?._fully_loaded && Jupyter.notebook.kernel?.is_connected()"
    """ : document.querySelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')"""
    " && document.querySelector('.jp-Toolbar-kernelName')?.textContent.includes('Python 3')"
)
_OUTPUT = "return [...document.querySelectorAll('.output_text pre, .jp-OutputArea-output pre')].map(part => part.textContent.trim());"


@pytest.fixture
def lab(make_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Jupyter, str, Browser]]:
    """examples/jupyter as it is."""
    with jupyter(tmp_path_factory.mktemp("jupyter") / "home", "/node/node-a/") as server:
        stack = make_stack()
        port = free_port()
        certificate = issue(stack.write_relay_config("node-a", {}).parent, "lab")
        example(stack, "jupyter", {"0.0.0.0:443": f"127.0.0.1:{port}", "lab.example.com": "lab.test"})
        changes = {"port = 8899": f"port = {server.port}", "lab.example.com": "lab.test", "10.0.0.7": "127.0.0.1"}
        example(stack, "jupyter", changes, relay="node-a")
        stack.start_gateway()
        stack.start_relay("node-a")
        with chromium([certificate]) as window:
            yield stack, server, f"https://lab.test:{port}/node/node-a/", window


def run_cell(window: Browser, number: int, code: str) -> None:
    """Type into this cell, the last there is, and run it."""
    cell = f"{_CELLS}[{number}]"
    window.wait(f"{_CELLS}.length == {number + 1}")

    def is_entered() -> bool:
        window.click_on(cell)  # again, if the page was still moving when it came
        return bool(window.run(f"return {cell}.contains(document.activeElement);"))

    wait_until(is_entered, 30, f"the cursor in cell {number}")
    window.type(code)
    window.wait(f"{cell}.innerText.includes({json.dumps(code)})")
    window.press(SHIFT, ENTER)


def test_log_in_and_run_cells_across_a_cut(lab: tuple[Stack, Jupyter, str, Browser]) -> None:
    stack, server, url, window = lab
    window.open(url + ("lab/tree/new.ipynb" if server.is_lab else "notebooks/new.ipynb"))
    window.wait("document.querySelector('input[type=password]')")
    assert "/node/node-a/login" in window.run("return location.href")
    window.run(
        "const field = document.querySelector('input[type=password]'); field.value = arguments[0]; field.form.submit();", server.token
    )
    window.wait(_READY, 60)
    run_cell(window, 0, "import time; print(6*7)")
    wait_until(lambda: window.run(_OUTPUT) == ["42"], 60, "the first cell's output")
    run_cell(window, 1, "for number in range(30): print(number, time.sleep(0.05))")
    wait_until(lambda: len(window.run(_OUTPUT)) == 2, 60, "the beginning of the second cell's output")
    assert stack.cutter.cut() >= 1
    expected = "\n".join(f"{number} None" for number in range(30))
    wait_until(lambda: window.run(_OUTPUT)[1] == expected, 60, "the whole of the second cell's output")
    run_cell(window, 2, "open('written', 'w').write('by a cell')")
    wait_until((server.home / "written").exists, 60, "what the third cell writes")
    log = (server.home / "jupyter.log").read_text()
    assert log.count("Starting buffering") == 0, log  # its word for a WebSocket that has gone
