"""Every error that MMLM raises on purpose.

    MMLMError
    ├── ConfigError          a recipe or a config says something impossible
    │   ├── RegistryError    a name that no part answers to
    │   └── TemplateError    a chat template for which the loss mask cannot be proven
    ├── UsageError           wrong words on the command line (exit code 2)
    ├── ImageError           a picture that cannot be opened, or is too large to be safe
    ├── DataError            a source, a row or a benchmark that cannot be read
    ├── AlignmentError       placeholders and image features do not match
    ├── CheckpointError      a folder that cannot be loaded or saved as asked
    ├── TrainingError        a run that cannot start, go on, or be resumed
    ├── EvaluationError      a measurement that would not mean what it says
    └── MissingExtraError    an optional package is not installed

Catch `MMLMError` to separate what the user can mend from a bug in MMLM. The command
line prints these without a traceback. A message says what is wrong, what was expected,
and the mend, with the value and the config key.
"""

from __future__ import annotations


class MMLMError(Exception):
    """Base of everything that MMLM raises on purpose."""


class ConfigError(MMLMError, ValueError):
    """A recipe or a config says something impossible."""


class RegistryError(ConfigError):
    """No part answers to a name, or two parts want the same name."""


class TemplateError(ConfigError):
    """The loss mask of a chat template cannot be proven."""


class UsageError(MMLMError):
    """The words on the command line do not make a command."""


class ImageError(MMLMError, ValueError):
    """A picture cannot be opened, or is too large to be opened safely."""


class DataError(MMLMError):
    """A source, a row or a benchmark cannot be read."""


class AlignmentError(MMLMError):
    """The number of image placeholders and the number of image features differ."""


class CheckpointError(MMLMError):
    """A model folder cannot be loaded or saved as asked."""


class TrainingError(MMLMError):
    """A run cannot start, go on, or be resumed."""


class EvaluationError(MMLMError):
    """A measurement would not mean what it says."""


class MissingExtraError(MMLMError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, *, needed_for: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed. "
            f"Install it with:  pip install 'mmlm[{extra}]'"
        )
