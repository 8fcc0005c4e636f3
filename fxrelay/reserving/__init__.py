"""Reservations as a running relay keeps them: the store's records, the leases of its own logins, and who waits."""
