"""Seeds of random draws."""

import torch

from bernprune.seeding import generator


def test_seeds_are_the_same_on_every_machine_and_tell_labels_apart() -> None:
    assert generator(7, "windows", 3).initial_seed() == 174266668025845572
    purposes = [(0,), (1,), (0, 1), (0, "1"), (0, "a", "b"), (0, "ab"), (0, "a,b"), (0, "b", "a"), (0, -1), (0, "é")]
    seeds = {generator(seed, *labels).initial_seed() for seed, *labels in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(3, generator=generator(0, "a")) for _ in range(2)]
    assert torch.equal(*draws)
