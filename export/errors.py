"""What the export refuses, besides `spafl.errors.SettingsError` and `export.parity.ParityError`."""

from spafl.errors import SpaflError


class LoweringError(SpaflError):
    """A model holds an operation that has no exported form; the message names it."""
