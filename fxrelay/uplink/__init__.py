"""Dial every gateway and keep the links up."""
