"""Pure: whose stream it is, as far as that can be known before its first byte."""


def identity_of(client: str) -> str:
    """The user a stream counts as: its client's address, without the port. Empty if that is not known.

    `client` is ip:port as the gateway saw it, IPv6 in brackets. Everybody behind one address translation is one user.
    """
    host, colon, _ = client.rpartition(":")
    return host.removeprefix("[").removesuffix("]") if colon else ""
