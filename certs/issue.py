"""Issue the gateway's certificate from a private CA: a renewal, other host names, or a CA that `make_ca.py` made."""

import argparse
import sys
from pathlib import Path

from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import issue_server_certificate, load_authority
from fxtunnel.kit.files import read_secret, write_together


def main() -> int:
    """Write server.pem and server.key (0600), over older ones if need be. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ca", type=Path, required=True, help="the CA's certificate (ca.pem)")
    parser.add_argument("--ca-key", type=Path, required=True, help="its key, mode 0600 (ca.key)")
    parser.add_argument("--host", action="append", required=True, help="DNS name or IP of the gateway; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="directory for server.pem and server.key")
    given = parser.parse_args()
    try:
        authority = load_authority(_text_of(given.ca), read_secret(given.ca_key))
        certificate, key = issue_server_certificate(authority, given.host)
        write_together([(given.out / "server.key", key, 0o600), (given.out / "server.pem", certificate.encode(), 0o644)])
    except ConfigError as exc:
        print("\n".join(str(problem) for problem in exc.problems), file=sys.stderr)  # noqa: T201 - a script
        return 2
    except OSError as exc:
        print(f"{given.ca}: cannot be read: {exc.strerror}", file=sys.stderr)  # noqa: T201 - a script
        return 2
    return 0


def _text_of(certificate: Path) -> str:
    try:
        return certificate.read_text("utf-8")
    except UnicodeDecodeError as exc:
        convert = f"openssl x509 -inform DER -in {certificate} -out ca.pem"
        raise ConfigError.one(certificate, "", f"is not in PEM format; if it is DER, run: {convert}") from exc


if __name__ == "__main__":
    sys.exit(main())
