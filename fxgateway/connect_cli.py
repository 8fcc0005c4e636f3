"""Task: `fxgateway connect`, the one command that is for clients: it needs no configuration, and no gateway on this machine."""

from urllib.parse import urlsplit

import click


@click.command()
@click.argument("service")
@click.option(
    "--via", required=True, metavar="URL", envvar="FXGATEWAY_VIA", show_envvar=True, help="A door: http://HOST:PORT or https://HOST:PORT."
)
@click.option("--node", default="", help="The node that must serve it.")
@click.option("--direct", metavar="HOST:PORT", help="Try this address first, for two seconds: the node itself, from within its network.")
@click.option("--listen", metavar="HOST:PORT", help="Listen here and carry each connection, instead of standard input and output.")
@click.option(
    "--ca", "ca_file", type=click.Path(exists=True, dir_okay=False), help="Authorities for https, in PEM, instead of the system's."
)
@click.option(
    "--ticket", default="", metavar="FILE|-|env", help="Where a ticket is: a file, standard input's first line, or FXGATEWAY_TICKET."
)
def connect(service: str, via: str, node: str, direct: str | None, listen: str | None, ca_file: str | None, ticket: str) -> None:
    """Connect to SERVICE through a gateway, from a client's machine.

    \b
    ssh -o ProxyCommand='fxgateway connect ssh --node %h --via https://gw.example.com' node-a
    fxgateway connect desk --via https://gw.example.com --listen 127.0.0.1:5901

    A ticket, where the service asks for one, is good for one connection. A file is read for each, so whatever renews it can go on. Without
    --ticket the one in the environment is shown, if there is one: FXGATEWAY_TICKET.
    """
    import trio

    from fxgateway.connect import Wanted, forward, join_terminal, ticket_source
    from fxtunnel.kit.settings import Address
    from fxtunnel.model import is_name

    def address(text: str, option: str) -> Address:
        try:
            found = Address.parse(text)
        except ValueError as exc:
            raise click.UsageError(f"--{option}: {exc}") from None
        if found.path is not None:
            raise click.UsageError(f"--{option}: expected HOST:PORT")
        return found

    if not all(map(is_name, (service, node or service))):
        raise click.UsageError(
            f"{'--node' if is_name(service) else 'SERVICE'}: expected a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        )
    if not _is_door(via):
        raise click.UsageError("--via: expected http://HOST:PORT or https://HOST:PORT")
    if ticket == "-" and listen is not None:
        raise click.UsageError("--ticket -: one ticket is for one connection; give --listen a file, which is read for each")
    target = address(direct, "direct") if direct is not None else None
    wanted = Wanted(service, via, node, target, ticket_source(ticket), ca_file)
    if listen is None:
        trio.run(join_terminal, wanted)
        return
    local = address(listen, "listen")

    async def listening() -> None:
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(forward, wanted, local)
            click.echo(f"{service} is at {bound} until Ctrl-C")

    try:
        trio.run(listening)
    except KeyboardInterrupt:
        raise SystemExit(0) from None


def _is_door(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/") and not parts.query
        )
    except ValueError:  # a port that is none, an address in brackets that is none
        return False
