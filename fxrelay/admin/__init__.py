"""Health, metrics and status."""
