"""Several processes that are one gateway: a parent that listens and restarts, workers that serve, and what they tell each other."""
