"""The errors of this library: each message says what was given, what is allowed, what to do."""

from __future__ import annotations


class MLPMemError(Exception):
    """Base class of every error that a user of this library can cause and mend."""


class CorpusError(MLPMemError):
    """The documents cannot be read, or nothing is left to train on."""


class ConfigError(MLPMemError):
    """An option has a value outside what is allowed."""


class BaseModelError(MLPMemError):
    """The base language model cannot be found, loaded, or does not have a standard layer stack."""


class ArtifactError(MLPMemError):
    """A memory folder is missing, damaged, or made for another base model."""


class OutputError(MLPMemError):
    """The output folder cannot be used: not writable, in use, or holding something else."""


class ResourceError(MLPMemError):
    """The disk or the memory of this machine cannot hold what the work needs."""


class TrainingError(MLPMemError):
    """Training cannot go on: a loss or a state is not finite."""


class ClosedError(MLPMemError):
    """A memory was closed, and answers no more."""


class MissingDependencyError(MLPMemError, ImportError):
    """An optional package is not installed; the message holds the pip command."""
