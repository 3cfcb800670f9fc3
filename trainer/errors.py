"""What the trainer refuses.

SpaflError
├── DataError     a dataset or a partition is missing, damaged, too large, or not what its form promises
└── DemoError     a process of the demo failed; the text ends with its last lines and where its log is
"""

from spafl.errors import SpaflError


class DataError(SpaflError):
    """A dataset or a partition cannot be used as it is."""


class DemoError(SpaflError):
    """The demo cannot go on."""
