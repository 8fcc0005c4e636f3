"""Which node gets the next session: filters, the chain of balancing entries, placements on their way."""
