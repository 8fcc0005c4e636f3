"""A relay believes certificates of its gateway's authority, and no chain that only looks like one."""

import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fxtunnel.kit.certificates import Authority, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.tls import HandshakeFailed, client_context, handshake_client, handshake_server, server_context

HOST = "127.0.0.1"
Key = ec.EllipticCurvePrivateKey
Chain = tuple[Key, list[x509.Certificate]]


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def issue(
    subject: str, issuer: x509.Name, signer: Key | None, *, is_ca: bool | None = False, usage: x509.ObjectIdentifier | None = None
) -> Chain:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = signer or key
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(HOST))]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if is_ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return key, [builder.sign(signer, hashes.SHA256())]


def under(ca: Authority, subject: str = HOST, **options: object) -> Chain:
    root = x509.load_pem_x509_certificate(ca.cert_pem.encode())
    return issue(subject, root.subject, ca.key, **options)


def nested(ca: Authority, subject: str, *, is_ca: bool | None) -> Chain:
    """A certificate signed by one that the authority has signed."""
    middle_key, middle = under(ca, "middle", is_ca=is_ca)
    key, leaf = issue(subject, middle[0].subject, middle_key)
    return key, [*leaf, *middle]


def same_subject(ca: Authority) -> Chain:
    """Signed by a key of our own that goes by the authority's name, and by its key id."""
    root = x509.load_pem_x509_certificate(ca.cert_pem.encode())
    impostor = ec.generate_private_key(ec.SECP256R1())
    key, leaf = issue(HOST, root.subject, impostor)
    return key, leaf


def self_signed(ca: Authority) -> Chain:
    return issue(HOST, name(HOST), None)


FORGED: dict[str, Callable[[Authority], Chain]] = {
    "a leaf as an authority": lambda ca: nested(ca, HOST, is_ca=False),
    "no word of being an authority": lambda ca: nested(ca, HOST, is_ca=None),
    "another key under the authority's name": same_subject,
    "self-signed": self_signed,
    "for clients only": lambda ca: under(ca, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
}


async def shake_hands(chain: Chain, ca: Authority, path: Path) -> None:
    """Raises what the client says of the server's chain."""
    key, certificates = chain
    pem = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)
    (path / "chain.pem").write_bytes(pem)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(path / "key.pem", secret)
    context = server_context(path / "chain.pem", path / "key.pem", ["fx-data/1"])
    with socket.create_server((HOST, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]

    async def serve() -> None:
        try:
            (await handshake_server(far, context)).close()
        except HandshakeFailed:
            far.close()

    for sock in (near, far):
        sock.setblocking(False)
    refused: HandshakeFailed | None = None
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                (await handshake_client(near, client_context(ca.cert_pem, ["fx-data/1"]), HOST)).close()
            except HandshakeFailed as exc:
                refused = exc
                near.close()
    if refused is not None:
        raise refused


@pytest.mark.parametrize("kind", FORGED)
async def test_a_chain_that_only_looks_right_is_refused(kind: str, tmp_path: Path) -> None:
    ca = new_authority("the gateway's")
    with pytest.raises(HandshakeFailed):
        await shake_hands(FORGED[kind](ca), ca, tmp_path)


async def test_the_true_one_is_taken(tmp_path: Path) -> None:
    """What the others are told apart from."""
    ca = new_authority("the gateway's")
    await shake_hands(under(ca, usage=ExtendedKeyUsageOID.SERVER_AUTH), ca, tmp_path)
