"""Errors every room shares.

    SpaflError            anything this toolkit refuses; its text says what was got, expected and what to do
    ├── LayoutError       a threshold layout is inconsistent, or two layouts differ
    ├── WireError         bytes that are not the thresholds they claim to be
    ├── BundleError       a bundle is damaged, unsafe, too large or of another version
    └── SettingsError     an option or a setting the user gave cannot be used

Rooms add their own branches under `SpaflError`; the `spafl` command prints any of them as one line and exits 2.
"""


class SpaflError(Exception):
    """An input or a situation this toolkit refuses, in words meant for the person who can change it."""


class LayoutError(SpaflError):
    """A threshold layout is inconsistent, or thresholds belong to another layout."""


class WireError(SpaflError):
    """Bytes from the network are not valid thresholds. Nothing of them was used."""


class BundleError(SpaflError):
    """A bundle is damaged, unsafe, too large, or written by an incompatible version."""


class SettingsError(SpaflError):
    """An option or a setting cannot be used as given."""
