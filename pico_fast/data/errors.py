"""What can go wrong with data, as exceptions whose message says what was given, what was expected and what to do."""

from __future__ import annotations


class DataError(Exception):
    """The data cannot be used; the message names the file and, where there is one, the row or line."""


class TokenizerError(Exception):
    """A tokenizer cannot be loaded or lacks something; ``what`` happened and ``what_to_do`` about it."""

    def __init__(self, what: str, what_to_do: str):
        super().__init__(what, what_to_do)  # both arguments, so that the exception can be pickled between processes
        self.what = what
        self.what_to_do = what_to_do

    def __str__(self) -> str:
        return f"{self.what}; {self.what_to_do}"
