"""Stacks whose gateway has several workers."""

from tests.system.conftest import echo_service, home, make_shared_stack, make_stack, serve, swap_service

__all__ = ["echo_service", "home", "make_shared_stack", "make_stack", "serve", "swap_service"]
