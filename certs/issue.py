"""Issue the gateway's certificate from an existing private CA, without making a new CA."""

import argparse
from pathlib import Path

from fxtunnel.kit.certificates import issue_server_certificate, load_authority
from fxtunnel.kit.files import read_secret, write_atomic, write_secret


def main() -> None:
    """Write server.pem and server.key."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ca", type=Path, required=True, help="the CA's certificate (ca.pem)")
    parser.add_argument("--ca-key", type=Path, required=True, help="its key, mode 0600 (ca.key)")
    parser.add_argument("--host", action="append", required=True, help="DNS name or IP of the gateway; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="directory for server.pem and server.key")
    given = parser.parse_args()
    authority = load_authority(given.ca.read_text(), read_secret(given.ca_key))
    certificate, key = issue_server_certificate(authority, given.host)
    write_secret(given.out / "server.key", key)
    write_atomic(given.out / "server.pem", certificate.encode(), 0o644)


if __name__ == "__main__":
    main()
