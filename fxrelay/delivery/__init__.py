"""One stream from open to close."""
