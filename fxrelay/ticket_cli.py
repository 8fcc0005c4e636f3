"""Task: `fxrelay ticket`: a key to make tickets with, and tickets."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from fxtunnel.errors import ConfigError, FxError
from fxtunnel.model import ServiceName, is_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MAX_TTL_S: Final = 3_600


@click.group()
def ticket() -> None:
    """Make keys and tickets for services with `ticket = {…}`.

    Tickets are made wherever users are known: by a portal, or by this command on the administrator's machine. Relays need the public key
    only, gateways none.
    """


@ticket.command(short_help="Make a key pair, Ed25519.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="tickets.key", show_default=True, help="The private key.")
def keygen(out: Path) -> None:
    """Make an Ed25519 key: the private one (mode 0600), and beside it the public one, which relays get.

    \b
    fxrelay ticket keygen --out tickets.key
    Then, in relay.toml: [[service]] … ticket = {keys = "tickets.pub"}
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from fxtunnel.kit.files import write_atomic, write_secret
    from fxtunnel.kit.signed_claims import signing_key
    from fxtunnel.kit.tokens import key_to_pem, new_key

    public_path = out.with_suffix(".pub")
    if public_path == out:
        raise click.UsageError("--out: .pub is for the public key, which is written beside it")
    for path in (out, public_path):
        if os.path.lexists(path):
            raise FxError(f"{path} exists already; whoever holds tickets of that key would be locked out. Give another --out")
    key = new_key()
    write_secret(out, key_to_pem(key))
    write_atomic(public_path, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    click.echo(f"private key (keep it where tickets are made): {out}\npublic key (for relays): {public_path}")
    click.echo(f"key id: {signing_key(key.public_key()).kid}")


@ticket.command()
@click.option("--key", "key_path", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Private key, PEM, mode 0600.")
@click.option("--sub", required=True, help="The user.")
@click.option("--service", required=True, help="The service it is good for.")
@click.option("--node", default="", help="The only node it is good for.")
@click.option("--groups", default="", help="The user's groups, separated by commas.")
@click.option(
    "--ttl",
    default=60,
    show_default=True,
    type=click.IntRange(1, MAX_TTL_S),
    help="Seconds it lives; relays take no longer than the service's max_life_s (60).",
)
@click.option("--audience", default="", help="Where the service's configuration says `audience`.")
@click.option("--issuer", default="", help="Where the service's configuration says `issuer`.")
@click.option("--kid", default="", help="The key's id in the relays' JWK set; default: its thumbprint.")
def mint(key_path: Path, sub: str, service: str, node: str, groups: str, ttl: int, audience: str, issuer: str, kid: str) -> None:
    """Print a ticket: good for one connection within --ttl seconds.

    \b
    FXGATEWAY_TICKET=$(fxrelay ticket mint --key tickets.key --sub alice --service ssh) \\
      ssh -o ProxyCommand='fxgateway connect ssh --via https://gw.example.com' node-a
    """
    from fxrelay.admitting.ticket import UnsignedTicket, mint_ticket, problem_of_user
    from fxtunnel.kit.signed_claims import signing_key

    for option, name in (("--service", service), ("--node", node)):
        if name and not is_name(name):
            raise click.UsageError(f"{option}: expected a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    problem = problem_of_user(sub)
    if problem:
        raise click.UsageError(f"--{problem}")
    private = _load(key_path)
    try:
        known = signing_key(private.public_key(), kid)  # type: ignore[arg-type]  # it raises for the others
    except ValueError as exc:
        raise ConfigError.one(key_path, "", str(exc)) from exc
    unsigned = UnsignedTicket(sub, ServiceName(service), node, tuple(filter(None, groups.split(","))), audience, issuer, ttl)
    click.echo(mint_ticket(unsigned, private, known.algorithm, known.kid, time.time()))


def _load(path: Path) -> "PrivateKeyTypes":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from fxtunnel.kit.files import read_secret

    try:
        return load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ConfigError.one(path, "", "is not an unencrypted private key in PEM format") from exc
