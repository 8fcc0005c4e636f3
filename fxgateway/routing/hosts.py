"""Pure: which service a host and a path lead to, by the [[route]]s of the configuration.

The most specific host decides: the name itself, then the longest `*.` that covers it, then `*`. Within it the longest path does, by whole
segments. A look-up costs a few dict accesses, whether there is one route or ten thousand.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from fxtunnel.model import ServiceName

ANY: Final = "*"


@dataclass(frozen=True, slots=True)
class Route:
    """`host` is a name, `*.NAME` for everything below it, or `*`; `path` a prefix of whole segments, `/` for all."""

    host: str
    path: str
    service: ServiceName


@dataclass(frozen=True, slots=True)
class Found:
    """The service that a request goes to. `by_path`: other paths of the same host lead to other services."""

    service: ServiceName
    by_path: bool


class HostTable:
    """The routes of a configuration."""

    def __init__(self, routes: Iterable[Route] = ()) -> None:
        self._hosts: dict[str, dict[str, ServiceName]] = {}
        for route in routes:
            self._hosts.setdefault(route.host.lower(), {})[route.path.rstrip("/")] = route.service

    def services(self) -> frozenset[ServiceName]:
        """Every service that a route leads to."""
        return frozenset(service for paths in self._hosts.values() for service in paths.values())

    def find_host(self, host: str) -> ServiceName | None:
        """Where a connection goes of which only the host is known (TLS): the host's route for all paths. `host`: see `normal_host`."""
        paths = self._paths(host)
        return paths.get("") if paths is not None else None

    def find(self, host: str, path: str) -> Found | None:
        """Where a request goes; `path` begins with a slash."""
        paths = self._paths(host)
        if paths is None:
            return None
        for prefix in _prefixes(path):
            service = paths.get(prefix)
            if service is not None:
                return Found(service, len(set(paths.values())) > 1)
        return None

    def _paths(self, host: str) -> dict[str, ServiceName] | None:
        found = self._hosts.get(host)
        suffix = host
        while found is None and suffix:
            suffix = suffix.partition(".")[2]
            found = self._hosts.get(f"{ANY}.{suffix}")
        return found if found is not None else self._hosts.get(ANY)


def _prefixes(path: str) -> Iterator[str]:
    path = path.partition("?")[0].rstrip("/")
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def normal_host(text: str) -> str:
    """A host as the table knows it: lower case, without port and without the dot at the end (RFC 3986, 3.2.2; RFC 9110, 7.2)."""
    if text.startswith("["):
        return text.partition("]")[0].lower() + "]"
    return text.partition(":")[0].lower().removesuffix(".")
