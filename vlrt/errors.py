"""The errors of vlrt. Every message says what was given, what is accepted and what to do.

Knows nothing but their names: the layers raise them, the command line turns them into exit code 1.
"""


class VlrtError(Exception):
    """Base of every error that vlrt raises on purpose. The command line prints it in one line and exits with 1."""


class ConfigError(VlrtError):
    """A setting is unknown, of the wrong type, or out of its range."""


class CheckpointError(VlrtError):
    """A checkpoint directory cannot be used: files or tensors missing, damaged, or of an unknown kind."""


class ExportError(VlrtError):
    """An export cannot be done, or its result failed the parity gate and was not written."""


class BundleError(VlrtError):
    """A bundle cannot be used: not a bundle, damaged, or written by an incompatible version."""


class VideoError(VlrtError):
    """A video, image or array cannot be used: unreadable, empty, too short, or beyond a cap."""


class ClipError(VlrtError):
    """A saved clip cannot be written, or not be used: damaged, or computed by another bundle."""


class Stopped(VlrtError):
    """An answer was stopped before it was there: cancelled, or its time was over."""


class Busy(VlrtError):
    """More questions are waiting than may: ask again later, or let more wait."""


class BackendUnavailable(VlrtError):
    """A backend that was asked for cannot run on this machine; the message gives the reason."""
