"""Vocabulary of realloc: the types and files every other package speaks. Imports no torch."""

__version__ = "0.1.0"
