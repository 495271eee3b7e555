"""The errors that reach the user: one line saying where, what was found, and what to do.

Knows: that the line is one line, whose fault it says it is (a bag's, or the set-up's), and how a full disk
or one without locks shows.
Must not know: any other room.
"""

import errno

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # the file system cannot lock, as some on networks
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # OSError.errno: disk, quota or file size limit reached


class BagError(Exception):
    """A bag, or a folder of bags, that cannot be used: one line saying where, what, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names inside a damaged bag may hold line breaks


class SetupError(BagError):
    """Not one bag's fault (a full disk, a wrong setting), so that data.on_bad_bag: skip does not pass over it."""


class SettingError(SetupError):
    """A setting that cannot be used: one line with the file, the key, what was found and what was expected."""
