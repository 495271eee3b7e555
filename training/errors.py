"""The errors of training that several rooms raise. Each message is one line: what, where, and what to do."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting that cannot be used: one line with the file, the key, what was found and what was expected."""


class TrainingError(Exception):
    """Training cannot go on: one line with the step and what to do."""


class Stopped(BaseException):  # not an Exception: raised by a signal, it must pass through every `except Exception`
    """SIGTERM or SIGINT ended the run in an orderly way; the message says where it can go on."""
