"""The configurations under examples/, put into a stack: the test changes names and addresses, and nothing else."""

from collections.abc import Mapping
from pathlib import Path

import trustme

from tests.system.stack import Stack

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(stack: Stack, name: str, changes: Mapping[str, str], more: str = "", *, relay: str = "") -> None:
    """Give the gateway, or a relay, the configuration of examples/NAME with these changes, and `more` behind it."""
    text = (EXAMPLES / name / ("relay.toml" if relay else "gateway.toml")).read_text()
    if not relay:
        changes = {
            "0.0.0.0:8443": f"127.0.0.1:{stack.tunnel_port}",
            "gw.example.com:8443": f"127.0.0.1:{stack.cutter.port}",
            **changes,
        }
    for old, new in changes.items():
        assert old in text, f"examples/{name} has no {old}"
        text = text.replace(old, new)
    if relay:
        stack.write_relay_config(relay, {})
        stack.relay_config(relay).write_text(f"{text}\n{more}")
        return
    id_line = next(line for line in stack.gateway_config.read_text().splitlines() if line.startswith("gateway_id"))
    text = text.replace("[tunnel]\n", f"[tunnel]\n{id_line}\n")
    stack.gateway_config.write_text(f'{text}\n{more}\n[admin]\nlisten = "127.0.0.1:{stack.admin_port}"\n')


def issue(directory: Path, name: str) -> Path:
    """A certificate for NAME.test with its key beside it; nobody knows who signed it."""
    issued = trustme.CA().issue_cert(f"{name}.test")
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    key.write_bytes(issued.private_key_pem.bytes())
    key.chmod(0o600)
    return certificate
