"""The one exception of this package, and what its one-line messages are made of.

Must not know: anything else. Every other room may import this one.
"""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or trusted.

    The message is one line: which file, what was found, what was expected, what to do.
    """


def first_line(error: Exception) -> str:
    """What `error` says, without the further lines that torch and safetensors like to add."""
    return (str(error) or type(error).__name__).splitlines()[0]
