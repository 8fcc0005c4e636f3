"""Who may have a stream: tickets, owners, and how many at once."""
