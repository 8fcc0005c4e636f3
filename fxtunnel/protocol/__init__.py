"""Pure protocol: bytes and `now` in; bytes and events out. No sockets, clocks or tasks."""
