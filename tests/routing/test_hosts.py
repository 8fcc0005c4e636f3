"""Which service a host and a path lead to: the most specific host, then the longest path; the same with ten thousand routes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgateway.routing.hosts import Found, HostTable, Route, normal_host
from fxtunnel.model import ServiceName


def table(**routes: str) -> HostTable:
    """`service="host/path"`."""
    made = []
    for service, where in routes.items():
        host, slash, path = where.partition("/")
        made.append(Route(host, slash + path or "/", ServiceName(service)))
    return HostTable(made)


ROUTES = table(
    exact="a.example.com",
    docs="a.example.com/docs",
    manual="a.example.com/docs/manual/",
    wild="*.example.com",
    deeper="*.b.example.com",
    only="c.example.com/x",
    rest="*",
)


@pytest.mark.parametrize(
    ("host", "path", "service"),
    [
        ("a.example.com", "/", "exact"),
        ("a.example.com", "/docsother", "exact"),
        ("a.example.com", "/docs", "docs"),
        ("a.example.com", "/docs?x=/docs/manual", "docs"),
        ("a.example.com", "/docs/manual", "manual"),
        ("a.example.com", "/docs/manual/1?q", "manual"),
        ("a.example.com", "/docs//manual", "docs"),
        ("a.example.com", "/DOCS", "exact"),
        ("z.example.com", "/docs", "wild"),
        ("y.z.example.com", "/", "wild"),
        ("z.b.example.com", "/", "deeper"),
        ("b.example.com", "/", "wild"),
        ("example.com", "/", "rest"),
        ("aexample.com", "/", "rest"),
        ("", "/", "rest"),
        ("c.example.com", "/x/y", "only"),
        ("c.example.com", "/y", None),
    ],
)
def test_the_most_specific_host_decides_and_then_the_longest_path(host: str, path: str, service: str | None) -> None:
    found = ROUTES.find(host, path)
    assert (found.service if found is not None else None) == service


def test_a_connection_of_which_only_the_host_is_known_goes_where_all_paths_go() -> None:
    assert [ROUTES.find_host(host) for host in ("a.example.com", "c.example.com", "q.example.com", "other")] == [
        "exact",
        None,
        "wild",
        "rest",
    ]
    assert table(a="a").find_host("b") is None


def test_paths_matter_only_where_they_lead_to_different_services() -> None:
    assert ROUTES.find("a.example.com", "/") == Found(ServiceName("exact"), by_path=True)
    assert ROUTES.find("z.example.com", "/") == Found(ServiceName("wild"), by_path=False)
    same = HostTable([Route("a", "/", ServiceName("s")), Route("a", "/x", ServiceName("s"))])
    assert same.find("a", "/x") == Found(ServiceName("s"), by_path=False)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("A.Example.COM", "a.example.com"),
        ("a.example.com.", "a.example.com"),
        ("a.example.com:8443", "a.example.com"),
        ("[2001:DB8::1]:80", "[2001:db8::1]"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("", ""),
    ],
)
def test_hosts_are_compared_alike(text: str, host: str) -> None:
    assert normal_host(text) == host


LABELS = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)


@given(st.lists(st.tuples(st.booleans(), HOSTS), max_size=8), HOSTS, st.sampled_from([0, 1_000]))
def test_other_routes_change_nothing(entries: list[tuple[bool, str]], host: str, others: int) -> None:
    names = {("*." if below else "") + name for below, name in entries}
    noise = [Route(f"h{number}.invalid", "/", ServiceName("noise")) for number in range(others)]
    found = HostTable([*noise, *(Route(name, "/", ServiceName(name.replace("*", "_"))) for name in names)]).find_host(host)
    covering = [name for name in names if name == host or (name.startswith("*.") and host.endswith(name[1:]))]
    best = max(covering, key=lambda name: (name == host, len(name)), default=None)
    assert found == (best.replace("*", "_") if best is not None else None)
