"""The version, where the package and its set-up can both read it."""

__version__ = "0.2.0"
