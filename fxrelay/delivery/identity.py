"""Pure: which user a stream counts as, before anything has proved who it is."""


def identity_of(client: str) -> str:
    """The user that a stream counts as: its client's address without the port; empty if unknown.

    `client` is ip:port as the gateway saw it, IPv6 in brackets. Everybody behind one address translation is one user.
    """
    host, colon, _ = client.rpartition(":")
    return host.removeprefix("[").removesuffix("]") if colon else ""
