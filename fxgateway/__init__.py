"""The gateway in the DMZ: takes clients in and passes them down tunnels that relays opened."""
