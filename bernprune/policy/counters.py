"""Random numbers that are functions of where they stand: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011).

Nothing is drawn in turn, so the numbers of any rows and units can be had by themselves, again, and on any device:

    key      64 bits of the SHA-256 of ``[seed, "masks"]``, the first word and the second
    counter  unit // 4, row, step % 2^32, step // 2^32
    word     unit % 4 of the four that come out
    row      (window K + mask) C + chunk; window C + chunk where K antithetic masks share one

Behind a row's units, from the next multiple of 64 on, lies a word for each group of units, for masks that swing; those
are always of the mask's own row.

A kernel gets the same ones from ``tl.philox(first | second << 32, unit // 4, row, low, high)``.

Letters: R rows, U units, Q fours of units.
"""

import torch

from bernprune.seeding import counter_key

WORDS = 2**32  # how many values a word has

_LOW = WORDS - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # by which the key is raised from round to round: golden ratio and sqrt(3) - 1
_ROUNDS = 10

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Four, key: tuple[int, int]) -> Four:
    """Four 32-bit words from four and a key of two, all in int64 tensors that broadcast; any device."""
    c0, c1, c2, c3 = (part.contiguous().clone() for part in torch.broadcast_tensors(*counter))
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):  # in place: fresh memory for every operation would take longer than the operation
        # A product of 64 bits wraps around to a signed one with the same bits. What the shift brings in at the top is
        # cut off again, and with it the upper halves of c1 and c3, which nothing else looks at.
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3, p0, p1 = p1, p0, c3, c1
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)


def mask_words(seed: int, step: int, rows_R: torch.Tensor, units: range) -> torch.Tensor:
    """The random words of some rows of a step, int64 ``[R, U]`` in [0, 2^32), on the device of ``rows_R``.

    ``units`` are successive ones, the first a multiple of 4.
    """
    fours_Q = torch.arange(units.start // 4, (units.stop + 3) // 4, device=rows_R.device)
    low, high = (torch.tensor(part, device=rows_R.device) for part in (step & _LOW, step >> 32))
    words = torch.stack(philox((fours_Q, rows_R[:, None], low, high), counter_key(seed, "masks")), dim=-1)
    return words.flatten(1)[:, : len(units)]
