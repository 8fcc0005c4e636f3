"""See engine_fixtures.py."""

from engine_fixtures import contexts, no_descriptor_leaks

__all__ = ["contexts", "no_descriptor_leaks"]
