"""Stacks and services for system tests. What a fixture has started it ends, and it looks through the logs."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.peers import Service, echo, swap
from tests.system.stack import Stack

# A JWT is told by its dots: three letters alone occur in key ids by chance.
_SECRETS = re.compile(r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}|fx[et]_[A-Za-z0-9_-]{20,}|PRIVATE KEY")
_CLI_LINE = re.compile(r"fx(gateway|relay): ")

MakeStack = Callable[..., Stack]
Serve = Callable[..., Service]


@contextmanager
def _home() -> Iterator[Path]:
    """A directory with a short name: the paths of unix sockets are bounded."""
    path = Path(tempfile.mkdtemp(prefix="fx-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _stack_maker() -> Iterator[MakeStack]:
    stacks: list[Stack] = []
    with _home() as home:

        def make(*services: str, extra: str = "") -> Stack:
            directory = home / f"s{len(stacks)}"
            stack = Stack(directory, {service: free_port() for service in services}, extra)
            stacks.append(stack)
            return stack

        yield make
        for stack in stacks:
            stack.stop()
        for stack in stacks:
            check_logs(stack)


@contextmanager
def _server() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(handler: Callable[..., None], path: Path | None = None) -> Service:
            service = Service(handler, path)
            stack.callback(service.close)
            return service

        yield start


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory with a short name."""
    with _home() as path:
        yield path


@pytest.fixture
def make_stack() -> Iterator[MakeStack]:
    """`make_stack(*services, extra="")`: a stack with a door for each service and nothing started. Checks the logs in the end."""
    with _stack_maker() as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_stack() -> Iterator[MakeStack]:
    """`make_stack` for tests of one module that share a stack: starting one takes seconds."""
    with _stack_maker() as make:
        yield make


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(handler, path=None)`: a service for as long as the test runs."""
    with _server() as start:
        yield start


@pytest.fixture(scope="module")
def echo_service() -> Iterator[Service]:
    """Sends back what comes."""
    with _server() as start:
        yield start(echo)


@pytest.fixture
def swap_service(serve: Serve) -> Iterator[Service]:
    """The other side of `exchange`; a clean end in the middle of an upload fails the test."""
    service = serve(swap)
    yield service
    assert service.problems == []


def check_logs(stack: Stack) -> None:
    """What holds for every log, whatever the test was about: one JSON object a line, no traceback, no secret."""
    text = stack.logs()
    leak = _SECRETS.search(text)
    assert leak is None, f"a secret in the log: {leak}"
    assert "Traceback" not in text, text[max(0, text.find("Traceback") - 1000) :][:6000]
    for line in text.split("\n"):
        if line and not _CLI_LINE.match(line):
            assert set(json.loads(line)) >= {"ts", "level", "event", "logger"}, line
