"""A folder of reference banks, ``<category>.safetensors``: a bundle's, or one's own."""

from collections.abc import Mapping
from pathlib import Path

from adpretrain_hf.errors import InputError, MissingPathError
from adpretrain_hf.reference.bank import ReferenceBank


def read_references(folder: Path) -> dict[str, ReferenceBank]:
    """Reads all banks of a folder, by their categories, which the names of the files tell.

    Raises:
        MissingPathError: no such folder.
        BundleError: one of them is not a reference bank, or a damaged one.
        InputError: there is none.
    """
    return {path.stem: ReferenceBank.load(path) for path in bank_files(folder)}


def bank_files(folder: Path) -> list[Path]:
    """The files of a folder's banks; see ``read_references``."""
    if not folder.is_dir():
        raise MissingPathError(f"no folder of reference banks at {folder}")
    paths = sorted(folder.glob("[!.]*.safetensors"))
    if not paths:
        raise InputError(f"no reference banks in {folder}: expected <category>.safetensors (`adpretrain reference`)")
    return paths


def write_references(references: Mapping[str, ReferenceBank], folder: Path) -> None:
    """Writes banks to a folder, each named by its category; those of other categories stay.

    Raises:
        InputError: there are none, or a category that cannot name a file.
    """
    if not references:
        raise InputError("there are no references to save: set them first, by set_reference or set_references")
    for category in references:
        if not category or category.startswith(".") or set(category) & set("/\\"):
            expected = "a name without slashes that does not begin with a dot: it names the bank's file"
            raise InputError(f"the category of a reference is {category!r}, expected {expected}")
    for category, bank in references.items():
        bank.save(folder / f"{category}.safetensors")
