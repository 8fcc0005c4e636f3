"""Make a private CA: ca.pem, which relays pin, and ca.key, which signs for it. Best on a machine that is not the gateway."""

import argparse
import os
import sys
from pathlib import Path

from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.files import make_private_dir, write_atomic, write_secret


def main() -> int:
    """Write ca.pem and ca.key (0600); never over others. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help='what the CA calls itself, such as "Example site FX"')
    parser.add_argument("--out", type=Path, required=True, help="directory for ca.pem and ca.key; made with mode 0700 if absent")
    given = parser.parse_args()
    certificate, key = given.out / "ca.pem", given.out / "ca.key"
    try:
        make_private_dir(given.out)
        there = [path for path in (certificate, key) if os.path.lexists(path)]
        if there:
            raise ConfigError.one(there[0], "", "exists; a CA is replaced by hand, see certs/README.md")
        authority = new_authority(given.name)
        write_secret(key, authority.key_pem())
        write_atomic(certificate, authority.cert_pem.encode(), 0o644)
    except ConfigError as exc:
        print("\n".join(str(problem) for problem in exc.problems), file=sys.stderr)  # noqa: T201 - a script
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
