"""What the tests of searches have in common: states that are compared to the bit, and searches that read tokens.

Letters: B windows, K masks, C chunks, T tokens, U units, N channels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from spaces import make_space, normal_numbers, random_numbers

from bernprune.objective import MaskedObjective
from bernprune.policy.budget import Budget
from bernprune.policy.masks import CPU, Design, Masks
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.search import MaskSearch, Reading, Seen
from bernprune.policy.selection import Limits
from bernprune.run.checkpoint import read_state, write_state
from bernprune.units import MaskRows, UnitSpace

FREE = Limits(min_kv_groups=0, min_channels=0)

# States


def same_state(first: MaskSearch, second: MaskSearch) -> bool:
    """Bit for bit."""
    mine, others = (flat(search.state_dict()) for search in (first, second))
    assert mine.keys() == others.keys()
    return all(
        torch.equal(value, others[name]) if isinstance(value, torch.Tensor) else value == others[name]
        for name, value in mine.items()
    )


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """Without dictionaries of tensors in it."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        parts = flat(value) if isinstance(value, dict) and name != "last_round" else {"": value}
        found |= {f"{name} {part}": inner for part, inner in parts.items()}
    return found


def assert_resumes(
    make: Callable[[], MaskSearch], learn: Callable[[MaskSearch, range], None], stop: int, folder: Path
) -> None:
    """To the bit, through a file, whatever the search that goes on had learned, and the one that stopped learns on."""
    whole, first, second = make(), make(), make()
    learn(whole, range(stop + 4))
    learn(first, range(stop))
    learn(second, range(20, 25))
    assert not same_state(first, second)
    write_state(folder / "state", first.state_dict())
    second.load_state_dict(read_state(folder / "state"))
    learn(first, range(stop, stop + 3))
    learn(second, range(stop, stop + 4))
    assert same_state(whole, second)


# Searches that read tokens

SPACE = make_space(["kv_group", "channel"], [(2, 31), (1, 42)])
WINDOW, CHUNKS = 12, 3


def reading_search(*, space: Any = SPACE, design: Design | None = None, **given: Any) -> PosteriorSearch:
    budget, scores_U = Budget(space, 0.4), random_numbers(space.size, 1)
    settings = {"seed": 3, "design": design or Design(16, 4, CHUNKS), "round_steps": 2} | given
    return PosteriorSearch(budget, torch.full_like(scores_U, 0.6), scores_U, **settings)


def heavy_tailed(*shape: int, seed: int) -> torch.Tensor:
    """Of mean 1."""
    return (1.5 * normal_numbers(*shape, seed=seed) - 1.125).exp().float()


def reading_of(
    search: MaskSearch,
    masks_BKCU: MaskRows,
    step: int,
    *,
    even: bool = False,
    idle: Sequence[int] = (),
    noise: float = 10.0,
) -> Reading:
    """Of channels that do to a token in proportion to their activity, ``idle`` ones nothing to any; kv groups, and if
    even all, do as much to all."""
    channels_U = search.budget.space.of_kind("channel")
    activities_BTU = torch.ones(len(masks_BKCU), WINDOW, len(channels_U))
    if not even:
        activities_BTU[..., channels_U] = heavy_tailed(len(masks_BKCU), WINDOW, int(channels_U.sum()), seed=step)
    activities_BTU[..., list(idle)] = 0
    kept_BKTU = masks_BKCU[:].cpu().repeat_interleave(WINDOW // masks_BKCU.shape[2], dim=2)
    lost_BKT = -(kept_BKTU * activities_BTU[:, None]).double() @ random_numbers(len(channels_U), 8)
    losses_BKT = lost_BKT + noise * normal_numbers(*lost_BKT.shape, seed=step + 50)
    device = masks_BKCU.device if isinstance(masks_BKCU, Masks) else CPU
    return Reading(losses_BKT / WINDOW, showing(activities_BTU.to(device), search.budget.space))


def showing(activities_BTU: torch.Tensor, space: UnitSpace) -> Callable[[Seen], None]:
    """A look at the activities of the channels among the units; of some windows after the other, and of some twice."""

    def look(see: Seen) -> None:
        cut = len(activities_BTU) // 3
        for windows in (slice(0, cut + 1), slice(cut, len(activities_BTU))):
            for layer, members_F in enumerate(space.by_layer("channel")):
                see(layer, windows, activities_BTU[windows][..., members_F])

    return look


def read(
    search: MaskSearch, steps: range, *, told: bool = True, even: bool = False, device: torch.device = CPU
) -> None:
    """Learn from what is read on a device, or, not told of activities, from its losses alone."""
    for step in steps:
        masks_BKCU = search.ask(step).to(device)
        reading = reading_of(search, masks_BKCU, step, even=even)
        losses_BKC = reading.losses_BKT.unflatten(2, (masks_BKCU.shape[2], -1)).sum(-1)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0, reading=reading if told else None)


def miss(search: PosteriorSearch) -> float:
    """How far the worths of channels are from the truth, on average."""
    channels_U = search.budget.space.of_kind("channel")
    worth_U = random_numbers(search.budget.space.size, 8)
    return (search.worth_U - worth_U)[channels_U].square().mean().item()


def activities(objective: MaskedObjective, mask_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """All that a look shows, ``[B, T, N]``; channels of all layers in turn."""
    parts: dict[tuple[int, int], torch.Tensor] = {}

    def see(layer: int, windows: slice, active_RTF: torch.Tensor) -> None:
        parts[windows.start, layer] = active_RTF.abs().clone()

    objective.look(mask_U, tokens_BT, see)
    starts = sorted({start for start, _ in parts})
    return torch.cat([torch.cat([parts[at] for at in sorted(parts) if at[0] == start], dim=-1) for start in starts])
