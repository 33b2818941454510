"""What a user runs from a terminal: `deltaconv COMMAND`, one file per command."""


class CommandError(Exception):
    """What was expected, what was found and what to do, as sentences for the terminal."""
