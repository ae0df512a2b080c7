"""Every random draw of a run is a function of its seed and of labels that say what is drawn, never of what ran before.

So a resumed run repeats itself bit for bit, and workers that share a run agree without speaking to one another.
"""

import hashlib
import json

import torch

SEED_BITS = 63  # what a torch generator takes without a sign


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A fresh generator on the CPU for one purpose, such as ``generator(7, "windows", epoch)``.

    Its seed is the first 63 bits of the SHA-256 of the JSON text of ``[seed, *labels]``: 1 and "1" differ, and so
    do ("a", "b") and ("ab"). It is the same on every machine, and nothing global is seeded.

    torch's CPU generator uses only the low 32 bits of a seed, so two purposes share their numbers with a chance
    of 2^-32, which harms nobody.
    """
    return torch.Generator().manual_seed(_bits(seed, labels) >> (64 - SEED_BITS))


def counter_key(seed: int, *labels: int | str) -> tuple[int, int]:
    """Two words of 32 bits for a counter-based generator: the first 64 bits of the same digest."""
    bits = _bits(seed, labels)
    return bits >> 32, bits & 0xFFFFFFFF


def _bits(seed: int, labels: tuple[int | str, ...]) -> int:
    digest = hashlib.sha256(json.dumps([seed, *labels]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big")
