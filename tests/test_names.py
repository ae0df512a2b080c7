"""What is chosen by a word is refused by a sentence that gives the known ones, wherever it is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spaces import FLAT, random_numbers
from tiny_models import tiny_model

from bernprune.backends import load_backend
from bernprune.errors import ConfigError
from bernprune.models.view import describe
from bernprune.names import meant
from bernprune.objective import masked_objective
from bernprune.policy.baselines import make_baseline
from bernprune.policy.bernoulli import graded, initial_probs
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.reinforce import ReinforceSearch


def start(**named: Any) -> torch.Tensor:
    return initial_probs(FLAT, random_numbers(FLAT.size, 0), keep=0.7, **named)


def search(**named: Any) -> ReinforceSearch:
    baseline = make_baseline("none", window=2, num_masks=2)
    return ReinforceSearch(Budget(FLAT, 0.3), start(), baseline=baseline, seed=0, design=Design(1, 2), **named)


def objective(kind: Any) -> None:
    with masked_objective(describe(tiny_model("llama"), ("channel",)), kind=kind):
        pass


WORDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sampling": (lambda word: Design(1, 2, sampling=word), "antithetic"),
    "scaling": (lambda word: search(scaling=word), "raw"),
    "projection": (lambda word: search(projection=word), "published"),
    "map": (lambda word: start(map_name=word), "norm"),
    "scope": (lambda word: start(scope=word), "global"),
    "measure": (lambda word: Budget(FLAT, 0.3, measure=word), "flops"),
    "pools": (lambda word: Budget(FLAT, 0.3, pools=word), "separate"),
    "objective": (objective, "kl"),
    "baseline": (lambda word: make_baseline(word, window=2, num_masks=2), "matched"),
    "backend": (lambda word: load_backend(word, torch.device("cpu")), "torch"),
}


@pytest.mark.parametrize("what", WORDS)
def test_a_misspelt_word_is_refused(what: str) -> None:
    """Its neighbour that is right is taken."""
    take, word = WORDS[what]
    take(word)
    with pytest.raises(ConfigError, match=rf"^{what} '{word[:-1]}' is unknown; known are .*\b{word}\b"):
        take(word[:-1])


@pytest.mark.parametrize("name", ["wanda_SP", "WANDA-SP", "wandasp"])
def test_capitals_are_no_hindrance_to_a_guess(name: str) -> None:
    """Of what is meant in its own spelling, whatever that is."""
    assert meant(name, ("flap", "wanda-sp")) == "; did you mean 'wanda-sp'?"
    assert meant(name, ("FLAP", "Wanda-Sp")) == "; did you mean 'Wanda-Sp'?"
    assert meant("quite another", ("flap", "wanda-sp")) == ""


def test_grades_know_their_scopes() -> None:
    """As starts do."""
    with pytest.raises(ConfigError, match="scope 'layers' is unknown; known are layer, global, pooled"):
        graded(FLAT, random_numbers(FLAT.size, 0), "layers")  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(0, 2, 1), (1, 0, 1), (1, 2, 0), (-1, 2, 1)])
def test_a_design_has_some_of_everything(sizes: tuple[int, int, int]) -> None:
    """Masks that are none are not asked for."""
    with pytest.raises(ConfigError, match="groups, masks and chunks must be 1 or more, not {}, {}, {}".format(*sizes)):
        Design(*sizes)
