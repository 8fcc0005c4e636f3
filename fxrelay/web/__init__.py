"""HTTP services: requests of a stream are read, each goes to its node, and the answers come back."""
