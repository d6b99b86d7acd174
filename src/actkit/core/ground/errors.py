"""The errors of actkit. Each text names the parameter, what was given, what is allowed and what to do."""

from __future__ import annotations


class ActkitError(Exception):
    """Base of every error that actkit raises on purpose."""


class CoverageError(ActkitError):
    """Too small a share of the model is understood or touched."""


class MemoryLimitError(ActkitError):
    """The plan needs more memory than the cap allows; raised before work starts."""


class RecipeError(ActkitError, ValueError):
    """A recipe names an unknown method or setting, or transforms that exclude each other."""


class EditError(ActkitError, ValueError):
    """An edit does not fit the model (unknown path, wrong shape, tied parameter)."""


class CheckpointError(ActkitError):
    """A folder cannot be written or does not load exactly."""


class ExportError(ActkitError):
    """A format cannot hold the model; the text names what it cannot say."""


class FreshProcessError(ActkitError):
    """The fresh process died, took too long or reported an error; the text ends with its last lines."""


class DataError(ActkitError, ValueError):
    """Calibration or evaluation data that cannot be used."""


class NonFiniteError(ActkitError, ValueError):
    """NaN or Inf in a parameter or an activation; the text names which."""


class UnsupportedModelError(ActkitError, TypeError):
    """The model is in a state that actkit does not change (compiled, sharded, on the meta device)."""


class ProcessError(ActkitError):
    """Another of several processes failed, is gone, or went another way; or this is not done in several."""
