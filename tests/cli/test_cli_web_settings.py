"""The keys of HTTP services: what goes together, and what is said about the rest."""

import pytest
from cli_samples import RELAY_TOML, Write

import fxrelay.settings
from fxrelay.web.composing import verify_web_files
from fxtunnel.errors import ConfigError

HTTP = '[[service]]\nname = "site"\nprotocol = "http"\n'


def test_a_whole_service(relay_toml: Write) -> None:
    path = relay_toml(
        RELAY_TOML
        + HTTP
        + 'port = 3300\nnode_paths = true\naffinity = {cookie = "fxnode"}\ncookie_key = "c.key"\nhosts = ["A.Example.", "*.b"]\n'
        'tls = {cert = "c.pem", key = "k.pem"}\nmax_body = "1MiB"\n'
    )
    service = fxrelay.settings.load(path, {}).services[-1]
    assert service.hosts == ("a.example", "*.b")
    assert service.tls is not None
    assert (service.tls.cert, service.tls.key, service.cookie_key) == (path.parent / "c.pem", path.parent / "k.pem", path.parent / "c.key")
    assert (service.max_body, service.response_timeout_s, service.trust_forwarded) == (1 << 20, 60.0, False)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('[[service]]\nname = "s"\ntarget = "a:1"\nnode_paths = true', "only for a pool"),
        ('[[service]]\nname = "s"\ntarget = "a:1"\nhosts = ["a"]\nmax_body = 1', 'hosts, max_body: only for protocol = "http"'),
        (HTTP + 'target = "a:1"\naffinity = {cookie = "c"}', "affinity: only for a pool"),
        (HTTP + 'port = 1\naffinity = {cookie = "c", claim = "iss"}', "expected either `cookie` or `claim`"),
        (HTTP + "port = 1\naffinity = {}", "expected either `cookie` or `claim`"),
        (HTTP + 'port = 1\naffinity = {cookie = "a b"}', "expected a cookie's name"),
        (HTTP + 'port = 1\naffinity = {claim = "iss"}\ncookie_key = "k"', "cookie_key: only with affinity"),
        (HTTP + 'port = 1\nhosts = ["a:80"]', "expected host names without port"),
        (HTTP + 'port = 1\ntls = {cert = "c.pem"}', "is required"),
        (HTTP + "port = 1\nnode_path = true", "did you mean node_paths?"),
    ],
)
def test_what_does_not_go_together(relay_toml: Write, lines: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fxrelay.settings.load(relay_toml(RELAY_TOML + lines), {})
    assert said in str(caught.value)


def test_a_missing_cookie_key_is_told_with_the_command_that_makes_it(relay_toml: Write) -> None:
    path = relay_toml(RELAY_TOML + HTTP + 'port = 1\naffinity = {cookie = "n"}\ncookie_key = "c.key"\n')
    (problem,) = verify_web_files(fxrelay.settings.load(path, {}))
    assert f"does not exist; run: (umask 077; openssl rand -hex 32 > {path.parent / 'c.key'})" in str(problem)
