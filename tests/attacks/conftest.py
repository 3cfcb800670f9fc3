"""Attacks run against the real application."""

from tests.server_api.conftest import bundle, server

__all__ = ["bundle", "server"]
