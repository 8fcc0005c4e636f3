"""Port: the one question that OpenSSL asks of a server here, in the handshake: which protocol.

pyOpenSSL's callbacks are cffi's, made in memory that is writable and executable at once. MemoryDenyWriteExecute= of our units refuses that,
as SELinux may (execmem). Those of ctypes are libffi's, whose code is part of its library (3.4 and later).
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

from OpenSSL import SSL

# SSL_TLSEXT_ERR_OK and SSL_TLSEXT_ERR_NOACK of <openssl/tls1.h>, and SSL_CTX_alpn_select_cb_func of <openssl/ssl.h>.
_CHOSEN: Final = 0
_NOT_SPOKEN: Final = 3
_TYPE: Final = "int (*)(SSL *, unsigned char **, unsigned char *, const unsigned char *, unsigned int, void *)"
_Callback: Final = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_void_p,
)


def choose_alpn(context: SSL.Context, spoken: Sequence[bytes]) -> None:
    """Have a server's context agree on the first of `spoken` that a client offers, or on none. Once for each context.

    It is done below pyOpenSSL's public call, which stands in where what is below it is missing.
    """

    def choose(offered: Sequence[bytes]) -> bytes | None:
        return next((name for name in spoken if name in offered), None)

    private: Any = SSL
    private_context: Any = context
    try:
        lib, ffi, below = private._lib, private._ffi, private_context._context
        callback = _callback(choose, spoken)
        lib.SSL_CTX_set_alpn_select_cb(below, ffi.cast(_TYPE, ctypes.cast(callback, ctypes.c_void_p).value), ffi.NULL)
    except AttributeError:
        context.set_alpn_select_callback(lambda _, offered: choose(offered) or SSL.NO_OVERLAPPING_PROTOCOLS)
    else:
        context.set_app_data(callback)  # it must live as long as the context


def _callback(choose: Callable[[Sequence[bytes]], bytes | None], spoken: Sequence[bytes]) -> Any:
    # OpenSSL copies the name after the callback, from here.
    kept = {name: ctypes.create_string_buffer(name, len(name)) for name in spoken}

    def answer(_: int, out: Any, out_bytes: Any, offered: int, offered_bytes: int, __: int) -> int:
        name = choose(_names(ctypes.string_at(offered, offered_bytes)))
        if name is None:
            return _NOT_SPOKEN
        out[0] = ctypes.addressof(kept[name])
        out_bytes[0] = len(name)
        return _CHOSEN

    return _Callback(answer)


def _names(packed: bytes) -> list[bytes]:
    """RFC 7301, 3.1: each behind its length in one byte. OpenSSL has looked at the whole already."""
    names = []
    while packed:
        length = packed[0]
        names.append(packed[1 : 1 + length])
        packed = packed[1 + length :]
    return names
