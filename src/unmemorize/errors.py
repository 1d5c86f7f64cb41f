"""Every error a caller may want to catch, as one tree. Imports nothing.

    UnmemorizeError
      ConfigError             a setting is out of range, or two settings contradict each other
        PoolExhausted         a disjoint plan has no sinks left for another source
      DataError               a corpus, table or text cannot be used as it is
        IdError               ids or names are missing, repeated, unknown or degenerate
      FileFormatError         a file of ours is truncated, corrupted or of another version
      RunFolderError          a run folder is missing, holds another run, or cannot be written
      ModelNotSupported       no row of the site table fits this model
      SitesNotFound           a pattern matched no module
      SelfCheckFailed         a load-time check of a model did not hold
      NeuronSetMismatch       a neuron set or plan belongs to another model
      CheckpointMismatch      a checkpoint belongs to another run, model or plan
      IdsMissing              a training forward came without sink ids
      ShapeMismatch           an array's shape differs from what the call needs
      MissingExtra            an optional library is not installed

A message says what happened, what was expected, and what to do next. The command line prints it as
one line and exits with 2; everything that is not an `UnmemorizeError` is a defect of ours. `UnmemorizeWarning` is for
what stops nothing.
"""

from __future__ import annotations


class UnmemorizeError(Exception):
    """Root of the tree: catch this to catch every mistake the library explains."""


class ConfigError(UnmemorizeError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class PoolExhausted(ConfigError):
    """A disjoint plan was asked for more sources than its pool has slices."""


class DataError(UnmemorizeError, ValueError):
    """A corpus, table or text cannot be used as it is."""


class IdError(DataError):
    """Ids or names are missing, repeated, unknown to the plan, or degenerate under its scheme."""


class FileFormatError(UnmemorizeError, ValueError):
    """A file of ours is truncated, corrupted, or written by an unknown format version."""


class RunFolderError(UnmemorizeError, OSError):
    """A run folder is missing, holds another run, or cannot be written."""


class ModelNotSupported(UnmemorizeError, ValueError):
    """No row of the site table fits this model; the message shows how to pass one."""


class SitesNotFound(UnmemorizeError, LookupError):
    """A pattern or path matched no module of the model."""


class SelfCheckFailed(UnmemorizeError, RuntimeError):
    """A load-time check did not hold; the message names the check and its numbers."""


class NeuronSetMismatch(UnmemorizeError, ValueError):
    """A neuron set or plan was made for another model."""


class CheckpointMismatch(UnmemorizeError, ValueError):
    """A checkpoint belongs to another run, another model or another plan."""


class IdsMissing(UnmemorizeError, RuntimeError):
    """A model with sinks ran a training forward without sink ids.

    Raised instead of training every neuron as shared, which would look like a run that works.
    """


class ShapeMismatch(UnmemorizeError, ValueError):
    """An array's shape differs from what the call needs; the message shows both."""


class MissingExtra(UnmemorizeError, ImportError):
    """An optional library is not installed; the message shows the install line."""


class UnmemorizeWarning(UserWarning):
    """Something worth knowing happened and work goes on; the command line prints it to the error stream."""


def missing_extra(library: str, extra: str) -> MissingExtra:
    """Build the one message used wherever an optional library is absent."""
    return MissingExtra(f"{library} is not installed; run: pip install 'unmemorize[{extra}]'")
