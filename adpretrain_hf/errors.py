"""Errors that the user can mend: what was got, what was expected, what to do."""


class InputError(ValueError):
    """Something given by the caller is wrong; the message says what, and how to put it right."""


class ImageError(InputError):
    """One image cannot be used; the message names it. Long runs go on without it."""


class MissingPathError(ImageError, FileNotFoundError):
    """A path that does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


class BundleError(InputError):
    """A bundle, or a file in it, is incomplete, damaged or of another kind than expected."""
