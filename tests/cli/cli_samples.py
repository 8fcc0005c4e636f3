"""Small configurations that are right."""

from collections.abc import Callable
from pathlib import Path

Write = Callable[[str], Path]

GATEWAY_TOML = """
[tunnel]
listen = "127.0.0.1:0"
public_url = "wss://127.0.0.1:8443"
[[door]]
listen = "127.0.0.1:0"
service = "ssh"
[admin]
listen = "127.0.0.1:0"
"""

RELAY_TOML = """
[relay]
id = "node-a"
state_dir = "state"
[[gateway]]
file = "gateway.json"
[[service]]
name = "ssh"
target = "127.0.0.1:22"
"""
