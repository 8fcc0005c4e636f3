"""Outside judges of TLS and WebSockets: `python -m tests.conformance`. What is not installed is skipped, with a reason.

Programs are looked for on PATH, or where FX_SSLYZE, FX_SSLSCAN, FX_TESTSSL, FX_KOSOKU say; FX_TLSFUZZER names a checkout of tlsfuzzer, and
FX_TLSFUZZER_PYTHON the interpreter that has tlslite-ng.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.conformance import websockets
from tests.ports import free_port
from tests.system.stack import Stack

LIMIT_S = 300
OLD_VERSIONS = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2")
SUITES_13 = {"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"}
SUITES_12 = re.compile(r"TLS_ECDHE_(RSA|ECDSA)_WITH_(AES_(128|256)_GCM|CHACHA20_POLY1305)_SHA(256|384)$")
SSLYZE_SCANS = (
    *("--sslv2", "--sslv3", "--tlsv1", "--tlsv1_1", "--tlsv1_2", "--tlsv1_3", "--certinfo", "--elliptic_curves"),
    *("--heartbleed", "--openssl_ccs", "--reneg", "--compression", "--early_data", "--resum", "--robot"),
)
TESTSSL_TESTS = ("--protocols", "--server-defaults", "--vulnerable", "-f")
TLSFUZZER_SCRIPTS = (
    "test-tls13-conversation.py",
    "test-tls13-invalid-ciphers.py",
    "test-tls13-finished.py",
    "test-tls13-signature-algorithms.py",
    "test-tls13-record-layer-limits.py",
    "test-tls13-zero-length-data.py",
    "test-tls13-ccs.py",
)


@dataclass(frozen=True)
class Verdict:
    """What a judge said. `findings` is None when it was not asked."""

    judge: str
    version: str
    findings: list[str] | None
    detail: str

    @property
    def word(self) -> str:
        return "skipped" if self.findings is None else "ok" if not self.findings else "FINDINGS"


class NotThere(Exception):
    """The judge is not installed; says what to do."""


def program(name: str, variable: str, advice: str) -> str:
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        raise NotThere(f"{name} is not installed: {advice}")
    return found


def run(*words: str, limit_s: float = LIMIT_S, text: str = "", cwd: str | None = None) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, input=text, check=False, cwd=cwd)
    return done.stdout + done.stderr


def openssl(address: str, directory: Path) -> Verdict:
    """TLS 1.3 with our ALPN works; anything else is refused at once, with an alert."""
    tool = program("openssl", "FX_OPENSSL", "apt-get install openssl")
    findings = []
    session = directory / "session.pem"
    asking = ("-tls1_3", "-alpn", "http/1.1", "-ign_eof")  # waits for the answer, and so for what came before it
    client = (tool, "s_client", "-connect", address, "-CAfile", str(directory / "ca.pem"), "-verify_return_error")
    for name, words, wanted in (
        ("TLS 1.3, http/1.1", ("-tls1_3", "-alpn", "http/1.1"), r"ALPN protocol: http/1.1"),
        ("TLS 1.3, fx-data/1", ("-tls1_3", "-alpn", "fx-data/1"), r"ALPN protocol: fx-data/1"),
        ("a session to come back with", (*asking, "-sess_out", str(session)), r"Session Ticket arrived"),
        ("it is not resumed", (*asking, "-sess_in", str(session)), r"^(?!.*Reused, )(?=.*New, TLSv1\.3)"),
        ("another ALPN", ("-tls1_3", "-alpn", "h2"), r"alert no application protocol|No ALPN negotiated"),
        ("TLS 1.2", ("-tls1_2",), r"alert protocol version|alert number 70"),
    ):
        began = time.monotonic()
        answer = run(*client, *words, limit_s=20, text="GET / HTTP/1.1\r\nHost: gateway\r\n\r\n")
        if not re.search(wanted, answer, re.S) or time.monotonic() - began > 5:
            findings.append(f"{name}: {answer[-120:]!r}")
    return Verdict("openssl s_client", run(tool, "version").split(" (")[0].strip(), findings, "6 connections")


def sslyze(address: str, directory: Path) -> Verdict:
    """No old version, no weak suite, no renegotiation, no known hole."""
    return _sslyze("sslyze", address, directory, OLD_VERSIONS)


def sslyze_door(address: str, directory: Path) -> Verdict:
    """The same of a door where TLS ends for browsers: TLS 1.2 as well, with suites that have forward secrecy and authenticate."""
    return _sslyze("sslyze, https door", address, directory, OLD_VERSIONS[:-1])


def _sslyze(judge: str, address: str, directory: Path, old_versions: Sequence[str]) -> Verdict:
    tool = program("sslyze", "FX_SSLYZE", "pip install sslyze in an environment of its own, and FX_SSLYZE=…/bin/sslyze")
    report = directory / "sslyze.json"
    run(tool, *SSLYZE_SCANS, "--mozilla_config=disable", f"--json_out={report}", address)
    told = json.loads(report.read_text())
    (server,) = told["server_scan_results"]
    scan = server["scan_result"] or {}
    findings = [] if scan else [f"no scan: {server.get('connectivity_error_trace')}"[:300]]
    for name, attempt in scan.items():
        if attempt["status"] == "ERROR" and attempt["error_reason"] != "BUG_IN_SSLYZE":  # it expects another answer to no ALPN
            findings.append(f"{name}: {attempt['error_reason']}")

    def result(name: str) -> dict[str, object]:
        return scan.get(name, {}).get("result") or {}

    findings += [f"{version} is accepted" for version in old_versions if result(f"{version}_cipher_suites").get("accepted_cipher_suites")]
    accepted = {suite["cipher_suite"]["name"] for suite in result("tls_1_3_cipher_suites").get("accepted_cipher_suites", [])}
    if not accepted or accepted - SUITES_13:
        findings.append(f"TLS 1.3 suites: {sorted(accepted)}")
    suites_12 = {suite["cipher_suite"]["name"] for suite in result("tls_1_2_cipher_suites").get("accepted_cipher_suites", [])}
    findings += [f"TLS 1.2 suite {name}" for name in sorted(suites_12) if not SUITES_12.match(name)]
    for name, field, good in (
        ("heartbleed", "is_vulnerable_to_heartbleed", False),
        ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection", False),
        ("session_renegotiation", "is_vulnerable_to_client_renegotiation_dos", False),
        ("tls_compression", "supports_compression", False),
        ("tls_1_3_early_data", "supports_early_data", False),
    ):
        if result(name).get(field, good) is not good:
            findings.append(f"{field}: {result(name).get(field)}")
    version = run(tool, "--version").strip() or told.get("sslyze_version", "")
    return Verdict(
        judge, str(told.get("sslyze_version", version)), findings, f"{len(scan)} scans, suites {', '.join(sorted(accepted | suites_12))}"
    )


def sslscan(address: str, directory: Path) -> Verdict:
    """Only TLS 1.3; no compression, no renegotiation."""
    tool = program("sslscan", "FX_SSLSCAN", "apt-get install sslscan")
    text = run(tool, "--no-colour", "--show-certificate", address)
    findings = [line.strip() for line in text.splitlines() if re.match(r"(SSLv\d|TLSv1\.[0-2])\s+enabled", line)]
    findings += [] if re.search(r"TLSv1\.3\s+enabled", text) else [f"TLS 1.3 not found: {text[-200:]!r}"]
    findings += [line.strip() for line in text.splitlines() if "vulnerable" in line and "not vulnerable" not in line]
    suites = re.findall(r"^(?:Preferred|Accepted)\s+TLSv1\.3\s+\d+ bits\s+(\S+)", text, re.M)
    version = re.search(r"Version: (\S+)", text)
    return Verdict("sslscan", version[1] if version else "", findings, ", ".join(suites))


def testssl(address: str, directory: Path) -> Verdict:
    """Nothing of severity LOW or above, except what a private authority means."""
    tool = program("testssl", "FX_TESTSSL", "apt-get install testssl.sh")
    report = directory / "testssl.json"
    words = ("--quiet", "--color", "0", "--warnings", "off", "--jsonfile", str(report), *TESTSSL_TESTS)
    run("timeout", str(LIMIT_S), tool, *words, "--add-ca", str(directory / "ca.pem"), address, limit_s=LIMIT_S + 10)
    entries = json.loads(report.read_text()) if report.exists() and report.read_text().strip() else []
    severe = [entry for entry in entries if entry["severity"] in ("LOW", "MEDIUM", "HIGH", "CRITICAL", "FATAL")]
    expected = re.compile(
        r"cert_(chain_of_trust|revocation|crlDistributionPoints|ocspURL|extlifeSpan|trust)|OCSP_stapling|DNS_CAArecord|scanTime"
    )
    findings = [f"{entry['id']}: {entry['finding']}" for entry in severe if not expected.match(entry["id"])]
    if len(entries) < 10:
        findings.append(f"only {len(entries)} results")
    version = re.search(r"testssl(?:\.sh)?\s+(?:version\s+)?(\d\S*)", run(tool, "--version"))
    return Verdict("testssl.sh", version[1] if version else "", findings, f"{len(entries)} results, {len(severe)} above INFO")


def tlsfuzzer(address: str, directory: Path) -> Verdict:
    """No conversation fails that does not fail against `openssl s_server`."""
    home = os.environ.get("FX_TLSFUZZER", "")
    if not Path(home, "scripts").is_dir():
        raise NotThere("tlsfuzzer is not here: check it out, and FX_TLSFUZZER=…; FX_TLSFUZZER_PYTHON=… has tlslite-ng")
    python = os.environ.get("FX_TLSFUZZER_PYTHON", sys.executable)
    host, _, port = address.rpartition(":")
    findings, passed = [], 0
    for script in TLSFUZZER_SCRIPTS:
        text = run(python, f"scripts/{script}", "-h", host, "-p", port, cwd=home)
        found = re.search(r"PASS: (\d+).*?FAIL: (\d+)", text, re.S)
        passed += int(found[1]) if found else 0
        if found is None or int(found[2]):
            findings.append(f"{script}: {found[0].split() if found else text[-100:]!r}")
    return Verdict("tlsfuzzer", "", findings, f"{passed} conversations passed")


def autobahn(address: str, directory: Path) -> Verdict:
    """A WebSocket server gets the same verdicts behind a gateway and a relay as without them; see `websockets`."""
    tool = program("kosoku", "FX_KOSOKU", "pip install kosoku in an environment of its own, and FX_KOSOKU=…/bin/kosoku")
    detail, findings = websockets.compare(tool, directory)
    return Verdict("Autobahn's cases (kosoku)", "", findings, detail)


Judge = Callable[[str, Path], Verdict]
JUDGES: tuple[Judge, ...] = (openssl, sslscan, sslyze, testssl, tlsfuzzer)
DOOR_JUDGES: tuple[Judge, ...] = (sslyze_door,)
OWN_JUDGES: tuple[Judge, ...] = (autobahn,)
"""They start what they need."""


@click.command()
@click.option("--only", multiple=True, help="Ask this judge; may be repeated.")
def main(only: tuple[str, ...]) -> None:
    """Start a gateway of its own, ask every judge that is installed, and print what they say."""
    console = Console()
    table = Table("judge", "version", "verdict", "detail", title="TLS and WebSockets")
    directory = Path(tempfile.mkdtemp(prefix="fx-"))
    bad = False
    try:
        # Scanners open many connections and say little on them.
        door = free_port()
        extra = (
            f'[[door]]\nlisten = "127.0.0.1:{door}"\nkind = "https"\nservice = "echo"\ncertificate = "server.pem"\nkey = "server.key"\n'
            "[limits]\npending_handshakes_per_source = 512\n"
        )
        stack = Stack(directory / "s", {"echo": 0}, extra)
        try:
            stack.start_gateway()
            for judge in (*JUDGES, *DOOR_JUDGES, *OWN_JUDGES):
                if only and judge.__name__ not in only:
                    continue
                try:
                    with console.status(f"asking {judge.__name__} …"):
                        verdict = judge(f"127.0.0.1:{door if judge in DOOR_JUDGES else stack.tunnel_port}", stack.directory)
                except NotThere as exc:
                    verdict = Verdict(judge.__name__, "", None, str(exc))
                except Exception as exc:
                    verdict = Verdict(judge.__name__, "", [f"{type(exc).__name__}: {exc}"[:400]], "")
                bad = bad or verdict.word == "FINDINGS"
                table.add_row(verdict.judge, verdict.version, verdict.word, "\n".join([verdict.detail, *(verdict.findings or ())]))
            alive = stack.gateway.process.poll() is None and "Traceback" not in stack.logs()
        finally:
            stack.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    console.print(table)
    if bad or not alive:
        raise click.ClickException("see above" if alive else "the gateway had an error of its own, or ended")


if __name__ == "__main__":
    main()
