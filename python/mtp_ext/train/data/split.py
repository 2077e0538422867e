"""The held-out split: chooses the groups of documents for validation."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def hash_group(group: str, seed: int) -> int:
    """Returns a group's sort key in the split's random order: 64 bits of a hash of its name and the seed."""
    name = f"{seed}:{group}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def choose_validation(
    groups: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Chooses the held-out documents: whole groups, in the order of their hashes, as long as they fit the fraction.

    Groups larger than a quarter of the validation set stay in training, so that a few large ones do not dominate it,
    unless the others fill less than half of it. If no group fits (few files), the smallest one is held out.

    Args:
        groups: ``[documents]``, the hash of each document's group.
        sizes: ``[documents]``, bytes.
        fraction: Share of the bytes to hold out; exactly 0 and 1 put everything on one side.
    Returns:
        ``[documents]`` bool.
    Raises:
        ValueError: Both sides are asked for, but there is only one group.
    """
    if fraction in (0.0, 1.0):
        return np.full(groups.shape, fraction == 1.0)
    unique, member = np.unique(groups, return_inverse=True)  # sorted by hash: a random order that depends only on names
    if unique.size < 2:
        raise ValueError(
            f"validation_fraction {fraction}: the corpus is a single unit ({groups.size} documents in one file, "
            "package or record), so nothing can be held out; add files, or set it to 0 and train without validation"
        )
    group_bytes = np.bincount(member, weights=sizes).astype(np.int64)
    held_out = np.zeros(unique.size, dtype=np.bool_)
    wanted = left = fraction * float(group_bytes.sum())
    for largest in (wanted / 4, wanted):
        if left <= wanted / 2:
            break
        for index, size in enumerate(group_bytes.tolist()):
            if not held_out[index] and size <= min(largest, left):
                held_out[index] = True
                left -= size
    if not held_out.any():
        held_out[int(group_bytes.argmin())] = True
    return held_out[member]
