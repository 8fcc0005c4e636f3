"""What both daemons need and no tunnel knows: settings, logs, files, tokens, TLS, backoff."""
