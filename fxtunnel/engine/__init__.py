"""The data plane: one edge-triggered reactor, links, and sockets spliced to streams."""
