"""The split that an image belongs to, so that no patient is in two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from ...utils.errors import UserError
from .rows import Row

SPLITS = ("train", "val", "test")


def split_by_hash(key: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of a patient (or of an image without one); a function of `key` and `seed` alone.

    Args:
        key: patient or image.
        seed: gives another split.
        fractions: split → expected share; what remains is "train".
    """
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position -= fraction
    return "train"


def check_patients(rows: Iterable[Row]) -> None:
    """Refuse a patient in two splits; the message names rows, not patients.

    Raises:
        UserError: with the count of such patients and the first.
    """
    first: dict[str, Row] = {}
    leaks: dict[str, tuple[Row, Row]] = {}
    for row in rows:
        if row.patient is not None:
            earlier = first.setdefault(row.patient, row)
            if earlier.split != row.split:
                leaks.setdefault(row.patient, (earlier, row))
    if leaks:
        one, two = next(iter(leaks.values()))
        raise UserError(
            f"{len(leaks)} patients are in two splits; the first at {one.place} ({one.split}) and"
            f" {two.place} ({two.split}): correct the split lists"
        )
