"""Relays enrol, authenticate, are registered; streams are opened on one of them."""
