"""`spafl run`: an operator's terminal. It speaks the protocol over HTTP and needs nothing of the server's code."""

from server_api.operator.command import app

__all__ = ["app"]
