"""What a configuration names to learn by: the search, how its masks lie, its baseline, and what a mask loses.

Each but the second may be custom, in a Python file (``bernprune.custom``).
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from bernprune.config import METHOD_SETTINGS, RunConfig, make_config
from bernprune.custom import blamed, defined_at
from bernprune.errors import ConfigError
from bernprune.losses import LOSSES, TokenLoss, custom_loss
from bernprune.names import CUSTOM, place_of
from bernprune.policy.baselines import BASELINES, Baseline, LeaveOneOut, check_masks
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch, can_read
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch
from bernprune.sections import SearchConfig
from bernprune.settings import merge

_OURS: dict[str, type[MaskSearch]] = {"posterior": PosteriorSearch, "reinforce": ReinforceSearch}
METHODS = dict(_OURS)  # in which a benchmark may put another in the place of one
GIVEN = ("floor", "ceiling", "discount", "scores_US", "round_steps", "kernels")  # to a plain search, besides
_OF_BASELINE = ("needs_reference", "min_masks", "advantages", "state_dict", "load_state_dict")


def check_methods(config: RunConfig) -> None:
    """Raises ``ConfigError`` if something custom is not what it must be, or has no use for a setting."""
    if config.search.method not in METHODS:
        _check_search(config)
    if method_of(config) == "reinforce":
        baseline_of(config)
    if loss_of(config.search).needs_dense and config.fits_to_policy:
        raise ConfigError(
            f"objective {config.search.objective} compares with the dense model, whose weights search.refit replaces; "
            "give search.refit=false"
        )


def _check_search(config: RunConfig) -> None:
    """A custom search: whether a run can call it, and settings as they are checked for what it is a kind of."""
    name = config.search.method
    found = search_class(config)
    kind = method_of(config)
    step = ("learning_rate", "reference_BC", "reading")
    calls: list[tuple[str, Callable[..., Any], int, Iterable[str]]] = [
        ("tell", found.tell, 3, step),
        ("draw", found.draw, 2, ()),
        ("state_dict", found.state_dict, 1, ()),
        ("load_state_dict", found.load_state_dict, 2, ()),
    ]
    if kind == CUSTOM:
        _check_settings(config)
        if not inspect.ismethod(found.begin):
            raise ConfigError(f"search {name} must have a classmethod for its begin, but has {found.begin!r:.100}")
        calls.append(("begin", found.begin, 2, ("seed", "design", *GIVEN)))
        if found.begin.__func__ is MaskSearch.begin.__func__:  # type: ignore[attr-defined]
            calls.append(("__init__", found.__init__, 3, ("seed", "design")))
    else:
        try:
            make_config(merge(config.to_dict(), {"search": {"method": kind}}))
        except ConfigError as error:
            raise ConfigError(f"search {name} is a {METHODS[kind].__name__}, and {error}") from None
        ours = inspect.signature(_OURS[kind]).parameters.values()
        keywords = [parameter.name for parameter in ours if parameter.kind is parameter.KEYWORD_ONLY]
        calls.append(("__init__", found, len(ours) - len(keywords), keywords))
    like = MaskSearch if kind == CUSTOM else _OURS[kind]
    for part, function, count, named in calls:
        try:
            inspect.signature(function).bind(*[None] * count, **dict.fromkeys(named))
        except TypeError as error:
            raise ConfigError(f"search {name} must take in {part} what {like.__name__} does, but {error}") from None


def _check_settings(config: RunConfig) -> None:
    """Raises ``ConfigError`` for a setting that does not apply to a custom search."""
    search, meant = config.search, METHOD_SETTINGS[CUSTOM]
    if search_class(config).needs_reference:
        meant = (*meant, "reference")
    for known in METHOD_SETTINGS.values():
        for name in known:
            if name not in meant and config.changed(f"search.{name}"):
                raise ConfigError(f"search.{name} has no meaning for search.method {search.method!r}")
    if search.sequences == "auto":
        raise ConfigError(f"search.sequences 'auto' needs search.method 'posterior', not {search.method!r}")
    if search_class(config).needs_reading and not reads_activity(config):
        raise ConfigError(
            f"search {search.method} needs a reading of the text, which search.masks_per {search.masks_per!r} and "
            f"granularity {', '.join(config.granularity)} do not give"
        )


def method_of(config: RunConfig) -> str:
    """``posterior`` or ``reinforce``, if the search is one or a kind of one; otherwise ``CUSTOM``."""
    found = search_class(config)
    return next((name for name, ours in _OURS.items() if issubclass(found, ours)), CUSTOM)


def search_class(config: RunConfig) -> type[MaskSearch]:
    """How a run learns. Raises ``ConfigError`` if a place holds no ``MaskSearch`` that is complete."""
    name = config.search.method
    if name in METHODS:
        return METHODS[name]
    found: type[MaskSearch] = _own("search", name, "a subclass of bernprune.MaskSearch", _is_search)
    if inspect.isabstract(found):
        raise ConfigError(f"search {name} must define {', '.join(sorted(found.__abstractmethods__))}")
    if found.needs_reference and found.needs_reading:
        raise ConfigError(f"search {name} may need a reference or a reading of the text, but needs both")
    return found


def baseline_of(config: RunConfig) -> Baseline:
    """A fresh baseline. Raises ``ConfigError`` if a place holds none, or it needs more masks in a step."""
    search, name = config.search, config.search.baseline
    make: Callable[[int, int], Baseline] = (
        BASELINES[name]
        if name in BASELINES
        else blamed("baseline", name, _own("baseline", name, "a class of baselines", _is_baseline))
    )
    baseline = make(search.baseline_window, search.masks)
    if not isinstance(baseline.needs_reference, bool):
        raise ConfigError(f"baseline {name} must say by True or False whether it needs_reference")
    try:
        inspect.signature(baseline.advantages).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"baseline {name} must take returns and those of a reference in advantages, but {error}"
        ) from None
    check_masks(name, baseline, search.masks)
    if search.sampling == "antithetic" and not isinstance(baseline, LeaveOneOut):
        raise ConfigError(
            f"search.sampling 'antithetic' needs search.baseline 'leave-one-out' or a subclass of LeaveOneOut, not "
            f"{name!r}; with that take 'independent' or 'exact'"
        )
    return baseline


def loss_of(search: SearchConfig) -> TokenLoss:
    """What a mask loses at a token. Raises ``ConfigError`` if a place holds no function that can tell."""
    name = search.objective
    if name in LOSSES:
        return LOSSES[name]
    return custom_loss(blamed("objective", name, _own("objective", name, "a function", _is_function)), name)


def custom_places(config: RunConfig) -> list[tuple[str, str]]:
    """What a run takes from custom Python files: a word for each, and its place."""
    initial, search = config.initial, config.search
    named = [("score", name) for name in (initial.score, *initial.also, *initial.members)]
    named += [("search", search.method), ("baseline", search.baseline), ("objective", search.objective)]
    return [(what, name) for what, name in named if place_of(name)]


def reads_activity(config: RunConfig) -> bool:
    """Whether each window is read once more, for the activity of its channels."""
    estimates = method_of(config) == "posterior"
    wanted = config.search.by_activity if estimates else search_class(config).needs_reading
    return wanted and can_read(design_of(config), config.granularity)


def runs_reference(config: RunConfig) -> bool:
    """Whether each window is run once more, under the mask that others are compared with."""
    if method_of(config) == "reinforce":
        return baseline_of(config).needs_reference
    return search_class(config).needs_reference


def design_of(config: RunConfig) -> Design:
    """How the masks of a step are laid out."""
    search = config.search
    swings = method_of(config) == "posterior" and search.sampling != "exact" and "channel" in config.granularity
    swing = search.swing if swings else 0.0
    if search.masks_per == "batch":
        return Design(1, search.masks, sampling=search.sampling, swing=swing)
    chunks = config.data.window // config.chunk_tokens if search.masks_per == "chunk" else 1
    return Design(search.windows, search.masks, chunks, search.sampling, swing)


def _own(what: str, name: str, wanted: str, suits: Callable[[Any], bool]) -> Any:
    place = place_of(name)
    assert place is not None, "the configuration knows no other names"
    found = defined_at(what, *place, suits)
    if not suits(found):
        lacking = [part for part in _OF_BASELINE if what == "baseline" and not hasattr(found, part)]
        raise ConfigError(
            f"{what} {name} must be {wanted}, but "
            + (f"lacks {', '.join(lacking)}" if lacking else f"is {getattr(found, '__qualname__', found)!r:.100}")
        )
    return found


def _is_search(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, MaskSearch)


def _is_baseline(value: Any) -> bool:
    return isinstance(value, type) and all(hasattr(value, part) for part in _OF_BASELINE)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)
