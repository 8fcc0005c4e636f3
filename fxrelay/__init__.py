"""The relay inside: dials out to gateways and carries streams to the services its own config names."""
