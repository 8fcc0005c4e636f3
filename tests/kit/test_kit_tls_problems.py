"""What Pythons of different age say about the same end of a connection."""

import ssl

from fxtunnel.kit.tls_problems import HandshakeProblem, explain_to_server, is_torn, no_forged_end


def test_no_context_takes_a_bare_fin_for_an_end() -> None:
    """Python before 3.11.4, Debian 12's for one, sets this on every context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    assert not no_forged_end(context).options & ssl.OP_IGNORE_UNEXPECTED_EOF


def test_an_end_without_close_notify_is_told_in_the_words_of_any_python() -> None:
    older = ssl.SSLError(1, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
    older.reason = "UNEXPECTED_EOF_WHILE_READING"
    newer = ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
    newer.reason = ""
    for torn in (older, newer):
        assert is_torn(torn)
        assert explain_to_server(torn).problem is HandshakeProblem.CLOSED_BY_PEER
    assert not is_torn(ConnectionResetError())
