"""What a launch may raise."""


class PTXError(Exception):
    """The kernel did what stops it on a device (bounds, alignment, a deadlock), or has what is not covered here."""


class Hang(RuntimeError):
    """The kernel ran far longer than it was allowed to."""
