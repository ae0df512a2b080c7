"""One run as checked data: what YAML, flags and ``--set a.b=c`` may say, and what it means.

A preset is a set of defaults; anything given explicitly wins over it. Every problem is one sentence that names the
dotted key, the value and what is allowed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, model_validator

from bernprune.complaints import sentence
from bernprune.errors import ConfigError
from bernprune.names import CUSTOM, BackendName, Kind, PresetName, RepairName, place_of, unknown
from bernprune.presets import PRESETS
from bernprune.sections import (
    BudgetConfig,
    DataConfig,
    InitialConfig,
    ModelConfig,
    PlansConfig,
    PolicyConfig,
    RecoverConfig,
    RepairConfig,
    ReportConfig,
    SearchConfig,
    Section,
)
from bernprune.settings import merge, nested
from bernprune.units import ANCESTORS, KINDS, finest

EXPLORED = (0.5, 1.5)  # times a run's own sparsity
REPAIRS = tuple(name for name in get_args(RepairName) if name != "none")
REFITTING: tuple[RepairName, ...] = ("auto", "ridge", "two-step", "admm")  # repairs that write other weights
USUAL_CHUNKS = range(8, 33)  # shorter ones cost more masks than they tell

# Settings that only some of the methods know.
METHOD_SETTINGS: dict[str, tuple[str, ...]] = {
    "posterior": ("regret", "rounds", "forgetting", "swing", "by_activity", "look_windows"),
    "reinforce": ("learning_rate", "baseline", "reference", "baseline_window", "scaling", "epsilon", "pull"),
    CUSTOM: ("rounds", "learning_rate"),  # unless it is a kind of one of those
}
COMPARING = ("leave-one-out", "published")  # baselines that take the masks of a step from each other
# Other settings that mean nothing unless another one has one of these values.
_MEANT_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "initial.also": ("search.method", ("posterior", CUSTOM)),
    "initial.sharpness": ("initial.map", ("const",)),
    "search.discount": ("search.masks_per", ("chunk",)),
    "search.swing": ("search.sampling", ("independent", "antithetic")),
    "search.by_activity": ("search.masks_per", ("sequence", "chunk")),
    "search.reference": ("search.baseline", ("matched", CUSTOM)),
    "search.baseline_window": ("search.baseline", ("moving-average", "matched", "published", CUSTOM)),
    "search.epsilon": ("search.scaling", ("sqrt-fisher",)),
    "repair.windows": ("repair.method", REPAIRS),
    "repair.target": ("repair.method", REFITTING),
    "repair.ridges": ("repair.method", ("scale", "ridge", "two-step", "auto")),
    "repair.biases": ("repair.method", REPAIRS),
    "repair.judge_finalists": ("repair.method", REPAIRS),
}


class RunConfig(Section):
    """Everything a run is determined by, apart from the versions of its libraries."""

    preset: PresetName = "default"
    """Defaults under all that is given: 'default', 'reinforce' for plain policy gradients, or 'paper' for the published
    method."""
    model: ModelConfig = ModelConfig()
    """What is pruned."""
    data: DataConfig = DataConfig()
    """What it reads."""
    granularity: tuple[Kind, ...] = ("kv_group", "channel")
    """Levels that may be removed; any of: layer, attention, kv_group, ffn, channel."""
    budget: BudgetConfig = BudgetConfig()
    """How much goes, and what must stay."""
    initial: InitialConfig = InitialConfig()
    """Where the policy starts."""
    policy: PolicyConfig = PolicyConfig()
    """Where it may go."""
    search: SearchConfig = SearchConfig()
    """How it learns."""
    repair: RepairConfig = RepairConfig()
    """How what is kept makes up for the rest."""
    recover: RecoverConfig = RecoverConfig()
    """How what was kept is trained afterwards, by bernprune recover."""
    plans: PlansConfig = PlansConfig()
    """What else is selected from what was learned."""
    report: ReportConfig = ReportConfig()
    """What is measured besides perplexity."""
    backend: BackendName = "auto"
    """What runs the masked operations: 'torch', 'triton' (GPUs), or 'auto': triton where the GPU and model allow it,
    else torch."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of masks, windows and random scores; equal seeds repeat a run."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.search.refit is None:  # settled here: a repair that is changed on the way must not change the search
            refit = self.repair.method in REFITTING and self.refit_refused is None
            object.__setattr__(self, "search", self.search.model_copy(update={"refit": refit}))
        if self.data.eval_join is not None and self.data.eval_text is None:
            raise ValueError("data.eval_join is for data.eval_text, which is not given")
        if self.data.eval_tokens < self.data.window:
            raise ValueError(
                f"data.eval_tokens must be a window of {self.data.window} or more, but is {self.data.eval_tokens}"
            )
        if not self.granularity or len(set(self.granularity)) != len(self.granularity):
            raise ValueError(f"granularity must name different levels out of {', '.join(KINDS)}")
        if len({self.initial.score, *self.initial.also}) <= len(self.initial.also):
            raise ValueError(
                f"initial.also must name other metrics than initial.score {self.initial.score!r}, each once, but is "
                f"{', '.join(self.initial.also)}"
            )
        self._check_meaning()
        self._check_budget()
        self._check_search()
        (low, high), own = self.explored, self.budget.sparsity
        shown = [f"{sparsity:g}" for sparsity in self.plans.sparsities]  # as in the names of the files
        if len(set(shown)) < len(shown):
            raise ValueError(f"plans.sparsities must differ, but are {', '.join(shown)}")
        for at in self.plans.sparsities:
            if not low <= at <= high:
                raise ValueError(f"plans.sparsities holds {at:g}, but a run at {own:g} explores {low:g} to {high:g}")
        keep = 1 - self.budget.sparsity
        if not self.policy.floor < keep < self.policy.ceiling:
            raise ValueError(
                f"budget.sparsity {self.budget.sparsity:g} keeps a share of {keep:g}, which must lie strictly between "
                f"policy.floor {self.policy.floor:g} and policy.ceiling {self.policy.ceiling:g}"
            )
        return self

    def _check_budget(self) -> None:
        """What else must go, besides the sparsity."""
        given = self.budget
        if given.measure in given.also:
            raise ValueError(
                f"budget.also_{given.measure} has no meaning for budget.measure {given.measure!r}, of which "
                "budget.sparsity says how much goes"
            )
        if given.also and (given.pools == "separate" or self.policy.projection == "published"):
            raise ValueError(
                f"budget.also_{next(iter(given.also))} needs budget.pools 'joint' and policy.projection "
                f"'cost-weighted', but they are {given.pools!r} and {self.policy.projection!r}"
            )
        if given.also and any(set(ANCESTORS[kind]) & set(self.granularity) for kind in self.granularity):
            raise ValueError(
                f"budget.also_{next(iter(given.also))} needs a granularity of units that do not lie in one another, "
                f"but that is {', '.join(self.granularity)}"
            )
        if "kv_cache" in given.also and not {"layer", "attention", "kv_group"} & set(self.granularity):
            raise ValueError(
                f"budget.also_kv_cache needs kv_group, attention or layer in the granularity, but that is "
                f"{', '.join(self.granularity)}"
            )
        for name, share in given.also.items():
            if not self.policy.floor < 1 - share:
                raise ValueError(
                    f"budget.also_{name} {share:g} leaves {1 - share:g}, which must be above policy.floor "
                    f"{self.policy.floor:g}"
                )

    def _check_meaning(self) -> None:
        """A setting that would be ignored is an error, unless it is as by default or says that something is off."""
        of_method = {
            f"search.{name}": ("search.method", tuple(m for m, known in METHOD_SETTINGS.items() if name in known))
            for names in METHOD_SETTINGS.values()
            for name in names
        }
        for setting, (other, values) in [*of_method.items(), *_MEANT_FOR.items()]:
            of_search = other == "search.method" or setting == "search.reference"
            custom = of_search and place_of(self.search.method) is not None  # whose class says what it knows
            if self._is_active(setting) and not custom and _in_general(self._value(other)) not in values:
                raise ValueError(
                    f"{setting}{self._preset_clause(setting)} has no meaning for {other} {self._value(other)!r}"
                )
        channels, flops = "channel" in self.granularity, "flops" in {self.budget.measure, *self.budget.also}
        for setting, meant, why in (
            ("plans.nested", bool(self.plans.sparsities), "without plans.sparsities"),
            ("budget.flops_window", flops, "for a budget that is not of flops"),
            ("budget.channel_multiple", channels, "without channel in the granularity"),
            ("search.swing", channels, "without channel in the granularity"),
            ("search.seconds", self.search.sequences != 0, "for search.sequences 0"),
        ):
            if self._is_active(setting) and not meant:
                raise ValueError(f"{setting} has no meaning {why}")
        for name in ("search.final_windows", "search.look_windows"):
            if self.changed(name) and not self.search.selection and (self.search.refit or self.search.selection == 0):
                why = "" if self.search.selection == 0 else ", which is the default with search.refit"
                raise ValueError(f"{name} has no meaning for search.selection 0{why}")

    def _value(self, setting: str) -> Any:
        section, name = setting.split(".")
        return getattr(getattr(self, section), name)

    def changed(self, setting: str) -> bool:
        """Whether a setting is not what it is by default."""
        section, name = setting.split(".")
        return bool(self._value(setting) != type(getattr(self, section)).model_fields[name].default)

    def _is_active(self, setting: str) -> bool:
        """Whether a setting is neither what it is by default, nor off."""
        return self.changed(setting) and bool(self._value(setting))

    def _preset_clause(self, setting: str) -> str:
        """``, which preset X sets,`` if the preset has given a setting its value, otherwise nothing."""
        section, name = setting.split(".")
        values = PRESETS[self.preset].get(section, {})
        return f", which preset {self.preset!r} sets," if values.get(name) == self._value(setting) else ""

    def _check_search(self) -> None:
        search = self.search
        if search.chunk is not None and search.masks_per != "chunk":
            raise ValueError(
                f"search.chunk {search.chunk} needs search.masks_per 'chunk', but that is {search.masks_per!r}"
            )
        if search.chunk is not None and self.data.window % search.chunk:
            raise ValueError(f"search.chunk {search.chunk} must divide data.window, which is {self.data.window}")
        if search.sequences == "auto" and search.method == "reinforce":
            raise ValueError(f"search.sequences 'auto' needs search.method 'posterior', not {search.method!r}")
        if search.method == "reinforce" and search.baseline in COMPARING and search.masks < 2:
            raise ValueError(
                f"search.baseline {search.baseline!r} needs 2 masks or more, but search.masks is {search.masks}"
            )
        if search.pull > 0 and not 0 < self.policy.floor < self.policy.ceiling < 1:
            raise ValueError("search.pull needs policy.floor above 0 and policy.ceiling below 1")
        if search.refit and self.refit_refused is not None:
            raise ValueError(f"search.refit has no meaning for {self.refit_refused}")
        self._check_sampling()
        if search.method == "posterior":
            if search.masks < 2:
                raise ValueError(f"search.method 'posterior' needs search.masks of 2 or more, but got {search.masks}")
            if not 0 < self.policy.floor < self.policy.ceiling < 1 or self.policy.projection != "cost-weighted":
                raise ValueError(
                    "search.method 'posterior' needs policy.floor above 0, policy.ceiling below 1 and "
                    "policy.projection 'cost-weighted'"
                )

    def _check_sampling(self) -> None:
        search = self.search
        paired = search.baseline == "leave-one-out" or place_of(search.baseline)  # a custom one may be one
        if search.sampling == "antithetic" and search.method == "reinforce" and not paired:
            raise ValueError(
                f"search.sampling 'antithetic' needs search.baseline 'leave-one-out', not {search.baseline!r}; with "
                "that take 'independent' or 'exact'"
            )
        one_group = search.masks_per == "batch" or search.windows == 1
        if search.sampling == "antithetic" and one_group and search.non_finite == "drop":
            raise ValueError(
                "search.sampling 'antithetic' needs all masks on the same text, and so search.non_finite 'error' for "
                "search.masks_per 'batch' or search.windows 1; to drop single ones take 'independent' or 'exact'"
            )
        if search.sampling == "exact" and len(finest(self.granularity)) < len(self.granularity):
            raise ValueError(
                "search.sampling 'exact' needs units that do not lie in one another, but granularity is "
                f"{', '.join(self.granularity)}"
            )

    @property
    def explored(self) -> tuple[float, float]:
        """Least and greatest sparsity that a run tells of: its masks come from near its own; worths differ beyond."""
        low, high = (round(share * self.budget.sparsity, 6) for share in EXPLORED)
        return low, min(high, 0.99)

    @property
    def refit_refused(self) -> str | None:
        """Why weights cannot be fitted to the policy, whatever follows; None if they can."""
        if self.search.objective == "kl":
            return f"search.objective {self.search.objective!r}, whose reference is the model as it is"
        if self.search.reference == "dense":
            return "search.reference 'dense', which is the model as it is"
        if self.search.dtype == "int8":
            return "search.dtype 'int8'"
        if not {"kv_group", "channel"} & set(self.granularity):
            return f"granularity {', '.join(self.granularity)}, of blocks that nothing within them makes up for"
        return None

    @property
    def searches(self) -> bool:
        """Whether anything is learned: of no sequences, only the metric's own selection is made."""
        return self.search.sequences != 0

    @property
    def fits_to_policy(self) -> bool:
        """Whether weights are fitted to the policy while it is learned."""
        return bool(self.search.refit) and self.searches

    @property
    def judges_finalists(self) -> bool:
        """Whether finalists of the search are judged by what they lose, after a repair of each if there is one.

        What was learned in view of a repair that is then given up may be worse than what the metric keeps.
        """
        given = self.repair.judge_finalists
        return self.fits_to_policy if given is None else given

    @property
    def longest_window(self) -> int:
        """Tokens that the model must take at once."""
        return max(self.data.window, self.initial.window or 0)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        window = self.data.window
        return self.search.chunk or max((size for size in USUAL_CHUNKS if window % size == 0), default=window)

    def to_dict(self, *, given_only: bool = False) -> dict[str, Any]:
        """Plain data, every field explicit or only those given; ``make_config`` reads it back to an equal config."""
        return self.model_dump(mode="json", exclude_unset=given_only)


def _in_general(value: Any) -> Any:
    """``CUSTOM`` for the place of something custom."""
    return CUSTOM if isinstance(value, str) and place_of(value) else value


def make_config(given: Mapping[str, Any]) -> RunConfig:
    """A checked config from nested plain data, in which keys may be dotted, over the defaults of its preset.

    Raises:
        ConfigError: unknown key (the nearest known one is suggested), wrong type, or a value out of range.
    """
    given = nested(given)
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(unknown("preset", str(preset), PRESETS))
    try:
        return RunConfig.model_validate(merge(PRESETS[preset], given))
    except ValidationError as error:
        raise ConfigError(sentence(error, RunConfig)) from None


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some settings changed; a repair that changes takes with it what means nothing for the new one.

    Raises:
        ConfigError: as ``make_config``.
    """
    before, repair = config.to_dict(), changes.get("repair")
    if isinstance(repair, Mapping) and "method" in repair:
        for setting, (other, methods) in _MEANT_FOR.items():
            if other == "repair.method" and repair["method"] not in methods:
                del before["repair"][setting.removeprefix("repair.")]
    return make_config(merge(before, changes))
