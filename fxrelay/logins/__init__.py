"""Logins of HTTP services: where they begin, succeed, fail and end, and what reservations have to do with it."""
