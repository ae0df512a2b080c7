"""Seeds of random draws."""

import torch

from bernprune.seeding import counter_key, generator


def test_seeds_are_the_same_on_every_machine_and_tell_labels_apart() -> None:
    assert generator(7, "windows", 3).initial_seed() == 174266668025845572
    purposes = [(0,), (1,), (0, 1), (0, "1"), (0, "a", "b"), (0, "ab"), (0, "a,b"), (0, "b", "a"), (0, -1), (0, "é")]
    seeds = {generator(seed, *labels).initial_seed() for seed, *labels in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(3, generator=generator(0, "a")) for _ in range(2)]
    assert torch.equal(*draws)


def test_keys_of_counters_are_the_same_digest() -> None:
    """Two words, the first one first; labels are told apart as for generators."""
    first, second = counter_key(7, "windows", 3)
    assert (first << 32 | second) >> 1 == generator(7, "windows", 3).initial_seed()
    assert counter_key(0, "masks") == (3082346779, 2485703090)
    keys = {counter_key(seed, label) for seed in (0, 1, -1, 2**40) for label in ("masks", "1", 1)}
    assert len(keys) == 12
    assert all(0 <= word < 2**32 for pair in keys for word in pair)
