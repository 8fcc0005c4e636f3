"""Autobahn's WebSocket cases against one server, directly and behind a gateway and a relay that reads HTTP: the verdicts are compared."""

import json
import subprocess
from pathlib import Path

from tests.ports import free_port
from tests.system.stack import Stack
from tests.system.websocket_echo import websocket_echo

LIMIT_S = 900


def compare(tool: str, directory: Path) -> tuple[str, list[str]]:
    """What was asked, and each case whose verdict differs. `tool` is kosoku, which has Autobahn's cases for Python 3."""
    server, door = websocket_echo(), free_port()
    extra = f'[[door]]\nlisten = "127.0.0.1:{door}"\nkind = "http"\nservice = "web"\n'
    stack = Stack(directory / "ws", {}, extra)
    try:
        stack.start_gateway()
        service = f'[[service]]\nname = "web"\nprotocol = "http"\ntarget = "{server.target}"\n'
        stack.start_relay("a", {}, extra=service)
        direct, through = (
            verdicts(tool, port, directory / name) for name, port in (("direct", int(server.target.rpartition(":")[2])), ("through", door))
        )
    finally:
        stack.stop()
        server.close()
    findings = [
        f"{case}: {direct.get(case)} directly, {through.get(case)} behind us" for case in direct if through.get(case) != direct[case]
    ]
    if len(direct) < 200:
        findings.append(f"only {len(direct)} cases")
    passed = sum(behaviour in ("OK", "INFORMATIONAL", "NON-STRICT") for behaviour, _ in through.values())
    return f"{len(through)} cases, {passed} passed, as directly", findings


def verdicts(tool: str, port: int, report: Path) -> dict[str, tuple[str, str]]:
    """Each case's behaviour, and how the connection was closed."""
    command = [tool, "--parallelism", "2", "--outdir", str(report), "-x", "12.*", "-x", "13.*", f"127.0.0.1:{port}"]
    subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    (agent,) = json.loads((report / "index.json").read_text()).values()
    return {case: (found["behavior"], found["behaviorClose"]) for case, found in agent.items()}
