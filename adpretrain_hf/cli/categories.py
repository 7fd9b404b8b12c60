"""Which product every image of a run shows: its folders tell, or a table."""

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from adpretrain_hf.errors import InputError, MissingPathError, one_of


def categories_of(names: Mapping[str, str], known: Collection[str], table: Path | None = None) -> dict[str, str]:
    """The category of every image.

    Args:
        names: of the images in the results, ``screw/test/000.png``, by what errors call the images.
        known: the categories that there are references of.
        table: a CSV file with the columns ``image``, a name in the results, and ``category``; without, an image's
            category is the first of the folders in its name that is one.

    Returns:
        The categories, by what errors call the images.

    Raises:
        InputError: images whose category is not told, or is not known, or a table without these columns.
    """
    if table is None:
        of = {
            name: next((part for part in PurePosixPath(name).parts[:-1] if part in known), "")
            for name in names.values()
        }
        expected = f"in a folder named {', '.join(sorted(known))}, or listed by --categories"
    else:
        of, expected = _read_table(table), f"a row of {table} with a category"
    if untold := [image for image, name in names.items() if not of.get(name)]:
        raise InputError(f"the category of {len(untold)} images is not told, such as {untold[0]}: expected {expected}")
    for name in names.values():
        if of[name] not in known:
            raise InputError(f"{table}: {name} is of the category {of[name]!r}, {one_of(of[name], known)}")
    return {image: of[name] for image, name in names.items()}


def _read_table(table: Path) -> dict[str, str]:
    if not table.is_file():
        raise MissingPathError(f"no table of categories at {table}")
    try:
        rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is no text in UTF-8 ({error}): save it as CSV UTF-8") from error
    if not {"image", "category"} <= {*(rows.fieldnames or ())}:
        raise InputError(f"{table} has the columns {rows.fieldnames}, expected image and category")
    of = dict[str, str]()
    for row in rows:
        if of.setdefault(row["image"], row["category"]) != row["category"]:
            raise InputError(f"{table} lists {row['image']} twice, as {of[row['image']]!r} and as {row['category']!r}")
    return of
