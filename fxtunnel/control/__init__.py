"""The control link: typed JSON messages on a WebSocket."""
