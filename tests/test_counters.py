"""The random numbers of masks: Philox as published, laid out as documented, so that a kernel can repeat them."""

import pytest
import torch

from bernprune.policy.counters import WORDS, mask_words, philox
from bernprune.seeding import counter_key

# Counter, key and words of the published implementation (Random123, kat_vectors).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
PLACES = [(0, 0, 0), (7, 3, 1), (2**40, 2**31 + 5, 2**32 + 9), (1, 2**32 - 1, 2**45 - 1)]  # seed, row, step


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def literal_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Ten rounds of the paper's figure, in Python's integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = second // WORDS ^ x1 ^ k0, second % WORDS, first // WORDS ^ x3 ^ k1, first % WORDS
        k0, k1 = (k0 + 0x9E3779B9) % WORDS, (k1 + 0xBB67AE85) % WORDS
    return [x0, x1, x2, x3]


def literal_word(seed: int, step: int, row: int, unit: int) -> int:
    """By the layout that kernels go by."""
    counter = [unit // 4, row, step % WORDS, step // WORDS]
    return literal_philox(counter, counter_key(seed, "masks"))[unit % 4]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: str, key: str, words: str) -> None:
    """To the bit, for one counter and for many, which the call leaves as they were."""
    first, second = words_of(key)
    assert literal_philox(words_of(counter), (first, second)) == words_of(words)
    for shape in ((), (1,), (3, 5)):
        given = tuple(torch.full(shape, word) for word in words_of(counter))
        found = philox(given, (first, second))
        assert [word.unique().tolist() for word in found] == [[word] for word in words_of(words)]
        assert all(part.eq(word).all() for part, word in zip(given, words_of(counter), strict=True))


def test_counters_broadcast() -> None:
    """Rows against columns, each with words of its own."""
    rows, columns, zero = torch.tensor([[3], [2**32 - 1]]), torch.tensor([0, 5, 2**31]), torch.tensor(0)
    found = torch.stack(philox((columns, rows, zero, zero), (1, 2)), dim=-1)
    for i, row in enumerate(rows[:, 0].tolist()):
        for j, column in enumerate(columns.tolist()):
            assert found[i, j].tolist() == literal_philox([column, row, 0, 0], (1, 2))


@pytest.mark.parametrize(("seed", "row", "step"), PLACES)
@pytest.mark.parametrize(
    "units", [range(0, 1), range(0, 4), range(0, 11), range(8, 17), range(2**20, 2**20 + 3)], ids=str
)
def test_words_stand_where_they_are_documented(seed: int, row: int, step: int, units: range) -> None:
    """Whatever is asked for with them."""
    rows_R = torch.tensor([row, row // 2, 5])
    words_RU = mask_words(seed, step, rows_R, units)
    assert words_RU.tolist() == [[literal_word(seed, step, r, unit) for unit in units] for r in rows_R.tolist()]


@pytest.mark.parametrize(("seed", "row", "step"), PLACES)
def test_triton_has_the_same_words(seed: int, row: int, step: int, device: torch.device) -> None:
    """Its own philox, by the layout that the module documents."""
    pytest.importorskip("triton", reason="triton is not installed")
    from philox_kernel import words_kernel

    first, second = counter_key(seed, "masks")
    signed = (first | second << 32) - (second >> 31 << 64)
    words_U = torch.zeros(64, dtype=torch.int64, device=device)
    words_kernel[(1,)](words_U, signed, row, step % 2**32, step >> 32, UNITS=64)
    assert torch.equal(words_U.cpu(), mask_words(seed, step, torch.tensor([row]), range(64))[0])
