"""Ports for tests, which run beside one another: the app's usual one may be taken between asking and listening."""
import socket


def own_port():
    "A port on 127.0.0.1 that the system picks."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
