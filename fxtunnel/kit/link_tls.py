"""Port: TLS sockets of a tunnel, by the OpenSSL that comes with the cryptography package, with the face of the ssl module's.

That OpenSSL is newer than most hosts' own, and is read and written without the ssl module's copies and Python frames: a hop of TLS costs
0.55 instead of 0.89 CPU s/GiB (docs/adr/0023). OpenSSL judges certificates; the server's name in them is service_identity's to compare
(RFC 9525), before a byte is sent.
"""

import base64
import errno
import os
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography import x509
from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from fxtunnel.kit.alpn_choice import choose_alpn

RECORD_BYTES: Final = 16_384
ReadRecords: TypeAlias = Callable[[memoryview, int], int]
"""Reads records into the front of the buffer, up to a short one, or the first that ends behind so many bytes; how many bytes they have.

Raises as `SSLSocket.recv_into` does if there is none. What is found behind others is raised by the next call.
"""
Send: TypeAlias = Callable[[memoryview], int]
"""Writes all of the buffer, or raises as `SSLSocket.send` does. After SSLWantWriteError the next call must begin with the same bytes."""

_CIPHERS: Final = b"DEFAULT:@SECLEVEL=2"
_NOT_VERIFIED: Final = "CERTIFICATE_VERIFY_FAILED"
# X509_V_ERR_UNSPECIFIED, X509_V_ERR_HOSTNAME_MISMATCH and others of <openssl/x509_vfy.h>.
_UNSPECIFIED: Final = 1
_WRONG_NAME: Final = 62
_OF_CERTIFICATES: Final = {
    _UNSPECIFIED: "OpenSSL does not say why",
    7: "its signature is wrong",
    18: "it is self-signed",
    19: "a self-signed certificate is in its chain",
    20: "its issuer is not known",
    21: "its signature cannot be checked",
    24: "what issued it is no authority",
    26: "it is for another purpose",
    79: "what issued it is no authority",
}
# RFC 9266, 2.
_BINDING_LABEL: Final = b"EXPORTER-Channel-Binding"
_BINDING_BYTES: Final = 32
# SSL_MODE_ENABLE_PARTIAL_WRITE of <openssl/ssl.h>, which pyOpenSSL sets and has no name for.
_MODE_PARTIAL_WRITE: Final = 1
# What pyOpenSSL says of a connection that ended without close_notify, where others have an errno.
_NO_ERRNO: Final = -1


class LinkContext:
    """What all links of one end have in common. Speaks TLS 1.3 and nothing else."""

    def __init__(self, method: int) -> None:
        self._context = SSL.Context(method)
        self._is_server = method == SSL.TLS_SERVER_METHOD
        self._context.set_min_proto_version(SSL.TLS1_3_VERSION)
        self._context.set_cipher_list(_CIPHERS)
        # With it a write ends behind the first record, and each takes a call of its own.
        self._context.clear_mode(_MODE_PARTIAL_WRITE)
        # An idle link keeps no buffers: 32 KiB an end instead of 65.
        self._context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        self._context.set_session_cache_mode(SSL.SESS_CACHE_OFF)

    def wrap(self, sock: socket.socket, server_hostname: str | None = None) -> "LinkSocket":
        """The socket with TLS about to begin; a client's must say whom it wants to speak to. `sock` is detached, unless this raises.

        Raises:
            ValueError: the name is not one that can be asked for.
        """
        connection = SSL.Connection(self._context, sock)
        if self._is_server:
            connection.set_accept_state()
            return LinkSocket(sock, connection, None)
        server = _Server(server_hostname or "")
        connection.set_connect_state()
        if server.name is not None:
            connection.set_tlsext_host_name(server.name)
        return LinkSocket(sock, connection, server)


def link_server_context(cert_path: Path, key_path: Path, alpn: Sequence[str]) -> LinkContext:
    """For a listening port, without sessions to resume: every connection is a full handshake.

    Raises:
        ssl.SSLError: a file is not PEM, or the two do not belong together; `reason` says which.
        OSError: a file cannot be read.
    """
    made = LinkContext(SSL.TLS_SERVER_METHOD)
    context = made._context
    context.set_options(SSL.OP_NO_TICKET)
    try:
        context.use_certificate_chain_file(cert_path)
        context.use_privatekey_file(key_path)
        context.check_privatekey()
    except SSL.Error as exc:
        raise _as_ssl_error(exc) from exc
    choose_alpn(context, [name.encode() for name in alpn])
    return made


def link_client_context(ca_pem: str, alpn: Sequence[str]) -> LinkContext:
    """Towards servers whose certificates come from `ca_pem` (one or more certificates) and bear the name that `wrap` is told.

    Raises:
        ValueError: `ca_pem` holds no certificate.
    """
    made = LinkContext(SSL.TLS_CLIENT_METHOD)
    made._context.set_verify(SSL.VERIFY_PEER)
    store = made._context.get_cert_store()
    if store is None:
        raise ValueError("OpenSSL has no room for certificates")
    for certificate in x509.load_pem_x509_certificates(ca_pem.encode()):
        store.add_cert(crypto.X509.from_cryptography(certificate))
    if alpn:
        made._context.set_alpn_protos([name.encode() for name in alpn])
    return made


class _Server:
    """Whom a client wants to speak to. `name` is what it asks for; none, if it has an address."""

    def __init__(self, hostname: str) -> None:
        self.name: bytes | None = None
        self._hostname = hostname
        try:
            ip_address(hostname)
        except ValueError:
            self.name = hostname.encode("idna")
            if not self.name:
                raise ValueError("a client must say whom it wants to speak to") from None

    def is_named_in(self, certificate: x509.Certificate | None) -> bool:
        """Whether it is the certificate of that server, and not of another one."""
        if certificate is None:
            return False
        try:
            if self.name is None:
                verify_certificate_ip_address(certificate, self._hostname)
            else:
                verify_certificate_hostname(certificate, self.name.decode())
        except (VerificationError, CertificateError, ValueError):
            return False
        return True


class LinkSocket(socket.socket):
    """A socket with TLS on it. What is not here is the socket's own, and plain; errors are those of the ssl module.

    Only the peer's close_notify is an end, as `SSLZeroReturnError`; a FIN without it is an SSLEOFError.
    """

    def __init__(self, sock: socket.socket, connection: SSL.Connection, server: _Server | None) -> None:
        timeout_s = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.settimeout(timeout_s)
        self._connection: SSL.Connection | None = connection
        self._server = server
        self._first_error: SSL.Error | None = None

    def do_handshake(self) -> None:
        """One step of the handshake. Writes to the socket itself, an alert included, before it raises."""
        self._tls(SSL.Connection.do_handshake)
        if self._server is not None:
            certificate = self._tls(partial(SSL.Connection.get_peer_certificate, as_cryptography=True))
            if not self._server.is_named_in(certificate):
                raise _refused(_WRONG_NAME)

    def recv(self, limit_bytes: int, _: int = 0) -> bytes:
        """At most so many bytes, of one record."""
        data: bytes = self._tls(SSL.Connection.recv, limit_bytes)
        return data

    def send(self, data: Any, _: int = 0) -> int:
        """Write all of `data`, or raise. After SSLWantWriteError the next call must begin with the same bytes."""
        count: int = self._tls(SSL.Connection.send, data)
        return count

    def pending(self) -> int:
        """How many bytes are decrypted and wait for `recv`."""
        count: int = self._tls(SSL.Connection.pending)
        return count

    def unwrap(self) -> None:
        """Send close_notify. That the peer's is not there yet is no concern."""
        self._tls(SSL.Connection.shutdown)

    def binding(self) -> str:
        """What both ends of this connection know, and nobody of any other: `tls-exporter` (RFC 9266) in base64url. After the handshake."""
        exported: bytes = self._tls(SSL.Connection.export_keying_material, _BINDING_LABEL, _BINDING_BYTES, b"")
        return base64.urlsafe_b64encode(exported).rstrip(b"=").decode()

    def selected_alpn_protocol(self) -> str | None:
        """The protocol both ends have agreed on."""
        name: bytes = self._tls(SSL.Connection.get_alpn_proto_negotiated)
        return name.decode("ascii", "replace") or None

    def version(self) -> str:
        """As in `TLSv1.3`."""
        name: str = self._tls(SSL.Connection.get_protocol_version_name)
        return name

    def close(self) -> None:
        """Close the socket. No call of `calls` may be made after it: the number of its descriptor may be another's by then."""
        self._connection = None
        super().close()

    def detach(self) -> int:
        """The descriptor, which is the caller's now, without TLS."""
        self._connection = None
        return super().detach()

    def calls(self) -> tuple[ReadRecords, Send]:
        """The two calls a link is read and written with, by the shortest way there is. Let go of both before the socket is closed.

        pyOpenSSL's `recv_into` copies what it has read. What it is made of does not, but is private: the public calls stand in for it.
        """
        private: Any = SSL
        connection: Any = self._connection
        try:
            lib, below, explain, from_buffer = private._lib, connection._ssl, private.Connection._raise_ssl_error, private._ffi.from_buffer
            read, write, get_error, wants_read = lib.SSL_read, lib.SSL_write, lib.SSL_get_error, lib.SSL_ERROR_WANT_READ
        except AttributeError:
            return self._read_records, self.send

        # Buffers are let go of at once: one that is held where the garbage collector finds it can bring the interpreter down.
        def read_records(buffer: memoryview, enough_bytes: int) -> int:
            filled, count = 0, RECORD_BYTES
            enough_bytes = min(enough_bytes, len(buffer) - RECORD_BYTES + 1)  # OpenSSL does not know how long it is
            with from_buffer(buffer) as front:
                while count == RECORD_BYTES and filled < enough_bytes:
                    count = read(below, front + filled, RECORD_BYTES)
                    if count > 0:
                        filled += count
            if count > 0:
                return filled
            if get_error(below, count) == wants_read:
                if filled:
                    return filled
                raise ssl.SSLWantReadError
            with suppress(OSError) if filled else nullcontext():
                self._tls(explain, below, count)
            return filled

        def send(data: memoryview) -> int:
            with from_buffer(data) as front:
                count: int = write(below, front, len(data))
            if count <= 0:
                self._tls(explain, below, count)
            return count

        return read_records, send

    def _read_records(self, buffer: memoryview, enough_bytes: int) -> int:
        filled, count = 0, RECORD_BYTES
        try:
            while count == RECORD_BYTES and filled < enough_bytes:
                count = self._tls(SSL.Connection.recv_into, buffer[filled:], RECORD_BYTES)
                filled += count
        except OSError:
            if not filled:
                raise
        return filled

    def _tls(self, call: Callable[..., Any], *arguments: object) -> Any:
        if self._connection is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            return call(self._connection, *arguments)
        except (SSL.WantReadError, SSL.WantWriteError) as exc:
            raise _as_ssl_error(exc) from None
        except SSL.Error as exc:
            _forget_errors()
            if self._first_error is None:  # OpenSSL has no words for those that follow
                self._first_error = exc.with_traceback(None)
            raise self._explained(self._first_error) from None

    def _explained(self, exc: SSL.Error) -> OSError:
        broken = _as_ssl_error(exc)
        if getattr(broken, "reason", "") != _NOT_VERIFIED:
            return broken
        private: Any = SSL
        connection: Any = self._connection
        try:
            return _refused(private._lib.SSL_get_verify_result(connection._ssl))
        except AttributeError:
            return _refused(_UNSPECIFIED)


def _refused(code: int) -> ssl.SSLCertVerificationError:
    refused = ssl.SSLCertVerificationError(ssl.SSL_ERROR_SSL, "certificate verify failed")
    refused.reason = _NOT_VERIFIED
    refused.verify_code = code
    refused.verify_message = _OF_CERTIFICATES.get(code, f"OpenSSL's X509_V_ERR {code}")
    return refused


def _forget_errors() -> None:
    """Empty this thread's queue of OpenSSL's errors, where pyOpenSSL leaves some of a broken connection: they would be the next one's."""
    lib: Any = getattr(SSL, "_lib", None)
    if lib is not None:
        lib.ERR_clear_error()


def _as_ssl_error(exc: SSL.Error) -> OSError:
    """What the ssl module would have raised."""
    match exc:
        case SSL.SysCallError(args=(int() as number, *_)) if number != _NO_ERRNO:
            return OSError(number, os.strerror(number))
        case SSL.WantReadError():
            broken: ssl.SSLError = ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "more has to be read")
        case SSL.WantWriteError():
            broken = ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "more has to be written")
        case SSL.ZeroReturnError():
            broken = ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "the peer has closed the connection")
        case SSL.SysCallError():
            broken = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection ended without a goodbye")
        case SSL.Error(args=([(_, _, words), *_],)):
            broken = ssl.SSLError(ssl.SSL_ERROR_SSL, words)
            broken.reason = re.sub(r"\W+", "_", words).upper()
            return broken
        case _:
            broken = ssl.SSLError(ssl.SSL_ERROR_SSL, "OpenSSL does not say why")
    broken.reason = ""  # which the ssl module sets, and its class alone does not have
    return broken
