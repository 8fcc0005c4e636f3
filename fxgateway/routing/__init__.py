"""Pure: which relay may take a client, and who is admitted."""
