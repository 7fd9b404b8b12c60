"""What a run is told of its references once: images cut off, and images that are references themselves."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from adpretrain_hf.errors import InputError, one_of
from adpretrain_hf.images import PreparedImage, digests
from adpretrain_hf.reference.bank import ReferenceBank, ReferenceImage

IS_OWN = "%s is a reference itself: such images are compared with the other references"
_LOG = logging.getLogger(__name__)
_UNSEEN = 0.02  # a share of an image that rounding does not explain


def check_category(category: str, banks: Mapping[str, ReferenceBank]) -> str:
    """Returns a category, if one of the banks is its own.

    Raises:
        InputError: none is; the message lists those that there are.
    """
    if category not in banks:
        there = one_of(category, banks) if banks else "no references are set"
        raise InputError(f"there is no reference of the category {category!r}: {there}")
    return category


def copies_among(images: Iterable[ReferenceImage | PreparedImage], told: Collection[str] = ()) -> list[int]:
    """The places of images that are copies of one before, which a warning names: they are to be left out.

    An image that is compared with the others would find its copy there, and look more normal than any new one.

    Args:
        images: in their order.
        told: digests of images whose copies a warning has named already.
    """
    first, copies = dict[str, int](), dict[int, str]()
    for place, (name, digest) in enumerate((image.name, image.digest) for image in images):
        if digest and first.setdefault(digest, place) != place:
            copies[place] = "" if digest in told else name
    if names := [*filter(None, copies.values())]:
        _LOG.warning("%d images are copies of others, and left out: %s", len(names), ", ".join(names))
    return list(copies)


class RunNotice:
    """Looks at the images of a run for what makes their scores mean something else, and says it once for a bank.

    Args:
        banks: that images are compared with, by their category.
    """

    def __init__(self, banks: Mapping[str, ReferenceBank]) -> None:
        self._banks = banks
        self._places = {
            category: {image.digest: place for place, image in enumerate(bank.images) if image.digest}
            for category, bank in banks.items()
        }

    def own(self, batch: Sequence[PreparedImage]) -> list[int | None]:
        """For each image which of its bank's images it is, or None; empty where none is, or cannot be left out."""
        for image in batch:
            if image.unseen > _UNSEEN:
                text = "%s: %.0f %% of it are cut off and not looked at; with resize_mode='resize' nothing is"
                say(self._banks[image.category], text, image.name, 100 * image.unseen)
        if not any(self._places.values()):
            return []
        places = [self._place(image, digest) for image, digest in zip(batch, digests(batch), strict=True)]
        return places if any(place is not None for place in places) else []

    def _place(self, image: PreparedImage, digest: str) -> int | None:
        place, bank = self._places[image.category].get(digest), self._banks[image.category]
        if place is None:
            return None
        if not bank.leaves_out:
            say(bank, "%s is a reference itself, and compared with itself: its score says nothing", image.name)
            return None
        say(bank, IS_OWN, image.name)
        return place


def say(bank: ReferenceBank, text: str, *values: object) -> None:
    """Logs a warning, once for a bank: a camera's frames are a run each."""
    if text not in bank.said:
        bank.said.add(text)
        _LOG.warning(f"{text} (said once)", *values)
