"""One run as checked data: what YAML, flags and ``--set a.b=c`` may say, and what it means.

A preset is a set of defaults; anything given explicitly wins over it. Every problem is one sentence that names the
dotted key, the value and what is allowed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bernprune.complaints import sentence
from bernprune.embedded import EMBEDDED
from bernprune.errors import ConfigError
from bernprune.names import (
    BackendName,
    BaselineName,
    Kind,
    MapName,
    MasksPer,
    Measure,
    MethodName,
    ObjectiveName,
    Pools,
    PresetName,
    Projection,
    ReferenceName,
    Sampling,
    Scaling,
    Scope,
    ScoreName,
)
from bernprune.presets import PRESETS
from bernprune.settings import merge
from bernprune.units import ANCESTORS, KINDS

Count = Annotated[int, Field(ge=1)]
EXPLORED = (0.5, 1.5)  # times its own sparsity
USUAL_CHUNKS = range(8, 33)  # shorter ones cost more masks than they tell
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`masks: yes` is 1 to pydantic, and a slip to us."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value


class ModelConfig(_Section):
    path: str = EMBEDDED
    """Local folder, Hugging Face name, or 'embedded'."""
    revision: str | None = None
    """Revision of a Hugging Face name."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights; 'auto' keeps the checkpoint's."""
    device: str = "auto"
    """'auto' (GPU if there is one), 'cpu', 'cuda' or 'cuda:N'."""
    trust_remote_code: bool = False
    """Run code that comes with the tokenizer or configuration."""


class DataConfig(_Section):
    text: str = EMBEDDED
    """Calibration text: .txt, .jsonl (field 'text'), .xz of either, dataset folder, Hugging Face dataset name."""
    eval_text: str | None = None
    """Held-out text for perplexity; by default the last tenth of the calibration text, which is then not used."""
    eval_join: str | None = None
    """Join the rows of the held-out text by this string, e.g. a blank line for WikiText-2; otherwise each is a text."""
    window: Annotated[int, Field(ge=2)] = 128
    """Tokens a window, in search and evaluation."""
    max_characters: Count = 64_000_000
    """Calibration text is read up to here."""
    eval_tokens: Count = 131_072
    """Evaluation text is cut to this many tokens."""


class BudgetConfig(_Section):
    sparsity: Share = 0.3
    """Share of the prunable cost to remove."""
    measure: Measure = "parameters"
    """What the cost is: parameters, or forward FLOPs per token at `flops_window`."""
    flops_window: Count = 2048
    """Sequence length at which attention FLOPs are counted."""
    pools: Pools = "joint"
    """'joint': one budget over all units; 'separate': each kind loses the same share (published)."""
    min_kv_groups: Annotated[int, Field(ge=0)] = 1
    """Kept in each layer unless a coarser unit removes the block; the first layer always keeps one."""
    min_channels: Annotated[int, Field(ge=0)] = 1
    """Kept in each layer unless a coarser unit removes the block."""
    channel_multiple: Count = 1
    """Kept channels of each layer are a multiple of this, e.g. 64 or 128 for tensor cores."""


class InitialConfig(_Section):
    score: ScoreName = "wanda-sp"
    """Metric that starts the policy."""
    also: tuple[ScoreName, ...] = ()
    """posterior: other metrics, which the regression of worths on scores looks at beside the first."""
    map: MapName = "const"
    """How scores become probabilities."""
    scope: Scope | None = None
    """Map the scores of each layer and kind by themselves ('layer'), each kind over all layers ('global'), or all at
    once ('pooled'); by default 'pooled' for flap and 'layer' for others."""
    sharpness: Annotated[float, Field(gt=0.5, le=1)] = 0.95
    """High probability of the map 'const'."""
    windows: Count = 128
    """Calibration windows the metric sees."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens of such a window; by default data.window."""
    inputs: Literal["dense", "pruned"] = "dense"
    """Score each layer on the dense model's activations, or on those of the already pruned earlier layers."""


class PolicyConfig(_Section):
    floor: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Least keep probability."""
    ceiling: Annotated[float, Field(gt=0.5, le=1)] = 0.98
    """Greatest keep probability."""
    projection: Projection = "cost-weighted"
    """'cost-weighted': equal shift, budget met exactly; 'published': at most the budget."""


class SearchConfig(_Section):
    sequences: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Windows run forward to learn and to choose, reference passes included, but not those of the initial metric; by
    default by the model's size. 0: the metric alone. 'auto': until search.regret is reached, or eight times the
    default is spent."""
    regret: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """posterior: stop once knowing all units exactly would gain less, in nats per token; by default 0.1 for 'auto'."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stop after this much search time; a run limited so is not repeatable to the bit."""
    method: MethodName = "posterior"
    """'posterior': estimate what each unit is worth, in rounds; 'reinforce': follow the gradient (published)."""
    masks: Count = 8
    """Masks that compete on the same text, a step."""
    windows: Count = 8
    """Windows of text a step."""
    masks_per: MasksPer = "chunk"
    """What has masks of its own: a whole 'batch' of windows (published), each 'sequence', or each 'chunk' of one."""
    sampling: Sampling = "antithetic"
    """Masks on one text: 'independent' (published), 'antithetic' (opposed), or 'exact' (on the budget; biased)."""
    chunk: Count | None = None
    """Tokens of a chunk; by default the largest divisor of data.window from 8 to 32, or else the whole window."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.4
    """How much a chunk's mask answers for the loss of each chunk behind it; 1 is unbiased, and noisy."""
    rounds: Count | None = None
    """posterior: how often the policy is renewed; by default for every 128 windows of text."""
    forgetting: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """posterior: share of what was known of whole layers that a round forgets."""
    swing: Annotated[float, Field(ge=0, le=1)] = 1.0
    """posterior: how far masks of the first round keep more or fewer channels of a layer; of round r an r-th of it."""
    by_activity: bool = True
    """posterior: learn of channels where they are active, in one more pass over the text; not for masks of a batch."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """reinforce: first step size; falls to zero along a cosine."""
    baseline: BaselineName = "leave-one-out"
    """reinforce: what is subtracted from the losses."""
    reference: ReferenceName = "initial"
    """reinforce: what 'matched' compares with: 'initial' or 'current' selection, 'dense' model, 'mean-field' gates."""
    baseline_window: Count = 5
    """reinforce: memory of a running baseline, in steps."""
    scaling: Scaling = "natural"
    """reinforce: preconditioning of the gradient."""
    epsilon: Annotated[float, Field(ge=0, lt=0.1)] = 0.0
    """reinforce: guard under the root of 'sqrt-fisher'."""
    pull: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """reinforce: weight of the policy's divergence from its start, in nats summed over units."""
    selection: Annotated[float, Field(ge=0, le=0.9)] | None = None
    """Share of the sequences (or seconds) for choosing what is kept, on text not learned from; 0: no choice. By default
    what six looks take, at most three tenths; for reinforce a tenth."""
    final_windows: Annotated[int, Field(ge=2)] = 128
    """Windows on which the last two of a race of selections are compared."""
    look_windows: Annotated[int, Field(ge=2)] = 8
    """posterior: windows on which it is looked at what single changes to the selection do."""
    objective: ObjectiveName = "cross-entropy"
    """'cross-entropy', or 'kl' to the dense model's predictions."""
    non_finite: Literal["error", "drop"] = "error"
    """What a loss that is not finite does: stop the run, or drop its mask from the step; such a finalist just loses."""
    rows_per_forward: Count | Literal["auto"] = "auto"
    """Most windows in one forward pass; 'auto': 64, on a GPU fewer or more as its memory allows."""
    costs: Literal["measured", "fixed"] = "measured"
    """By which the way of running masks is chosen; of models under ten million prunable parameters always 'fixed'."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints of the search, each after a whole step; the final choice is saved after each heat."""
    checkpoint_steps: Count | None = None
    """Also write a checkpoint every so many steps."""


# What only one of the methods knows.
METHOD_SETTINGS: dict[MethodName, tuple[str, ...]] = {
    "posterior": ("regret", "rounds", "forgetting", "swing", "by_activity", "look_windows"),
    "reinforce": ("learning_rate", "baseline", "reference", "baseline_window", "scaling", "epsilon", "pull"),
}
# What else says nothing unless another setting has one of these values.
_MEANT_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "initial.also": ("search.method", ("posterior",)),
    "initial.sharpness": ("initial.map", ("const",)),
    "search.discount": ("search.masks_per", ("chunk",)),
    "search.swing": ("search.sampling", ("independent", "antithetic")),
    "search.by_activity": ("search.masks_per", ("sequence", "chunk")),
    "search.reference": ("search.baseline", ("matched",)),
    "search.baseline_window": ("search.baseline", ("moving-average", "matched", "published")),
    "search.epsilon": ("search.scaling", ("sqrt-fisher",)),
}


class PlansConfig(_Section):
    sparsities: tuple[Share, ...] = ()
    """Other sparsities for which a plan is written and evaluated, from half the run's own to one and a half of it."""
    nested: bool = False
    """Whether each keeps, or is kept by, what the run keeps."""


class ReportConfig(_Section):
    latency_rows: Count = 8
    """Windows in the batch that latency is measured on."""
    latency_repeats: Annotated[int, Field(ge=2)] = 20
    """Timed passes."""
    initial_latency: bool = True
    """Also time the initial metric's model, for which the dense one is loaded once more."""


class RunConfig(_Section):
    """Everything a run is determined by, beside the versions of its libraries."""

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
    plans: PlansConfig = PlansConfig()
    """What else is selected from what was learned."""
    report: ReportConfig = ReportConfig()
    """What is measured beside perplexity."""
    backend: BackendName = "auto"
    """What runs the masked operations: 'torch', which 'auto' takes; 'triton' is refused until its kernels exist."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of masks, windows and random scores; equal seeds repeat a run."""

    @field_validator("granularity", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [kind.strip() for kind in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.data.eval_join is not None and self.data.eval_text is None:
            raise ValueError("data.eval_join is for data.eval_text, which is not given")
        if not self.granularity or len(set(self.granularity)) != len(self.granularity):
            raise ValueError(f"granularity must name different levels out of {', '.join(KINDS)}")
        if "flap" in (self.initial.score, *self.initial.also) and not {"kv_group", "channel"} >= set(self._finest()):
            raise ValueError(
                "initial.score 'flap' standardises its scores within each block, so it cannot rank whole blocks; add "
                "kv_group and channel to granularity, or take another score"
            )
        if len({self.initial.score, *self.initial.also}) <= len(self.initial.also):
            raise ValueError(
                f"initial.also must name other metrics than initial.score {self.initial.score!r}, each once, but is "
                f"{', '.join(self.initial.also)}"
            )
        self._check_meaning()
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
                f"budget.sparsity {self.budget.sparsity:g} keeps a share of {keep:g}, which must lie between "
                f"policy.floor {self.policy.floor:g} and policy.ceiling {self.policy.ceiling:g}"
            )
        return self

    def _check_meaning(self) -> None:
        """A setting that would be ignored is an error."""
        of_method = {
            f"search.{name}": ("search.method", (method,))
            for method, names in METHOD_SETTINGS.items()
            for name in names
        }
        for setting, (other, values) in [*of_method.items(), *_MEANT_FOR.items()]:
            if self._changed(setting) and self._value(other) not in values:
                raise ValueError(f"{setting} has no meaning for {other} {self._value(other)!r}")
        for name in ("search.final_windows", "search.look_windows"):
            if self._changed(name) and self.search.selection == 0:
                raise ValueError(f"{name} has no meaning for search.selection 0")

    def _value(self, setting: str) -> Any:
        section, name = setting.split(".")
        return getattr(getattr(self, section), name)

    def _changed(self, setting: str) -> bool:
        """Whether a setting is not what it is by default."""
        section, name = setting.split(".")
        return bool(self._value(setting) != type(getattr(self, section)).model_fields[name].default)

    def _check_search(self) -> None:
        search = self.search
        if search.chunk is not None and search.masks_per != "chunk":
            raise ValueError(
                f"search.chunk {search.chunk} needs search.masks_per 'chunk', but that is {search.masks_per!r}"
            )
        if search.chunk is not None and self.data.window % search.chunk:
            raise ValueError(f"search.chunk {search.chunk} must divide data.window, which is {self.data.window}")
        if search.sequences == "auto" and search.method != "posterior":
            raise ValueError(f"search.sequences 'auto' needs search.method 'posterior', not {search.method!r}")
        if search.pull > 0 and not 0 < self.policy.floor < self.policy.ceiling < 1:
            raise ValueError("search.pull needs policy.floor above 0 and policy.ceiling below 1")
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
        if search.sampling == "antithetic" and search.method == "reinforce" and search.baseline != "leave-one-out":
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
        if search.sampling == "exact" and len(self._finest()) < len(self.granularity):
            raise ValueError(
                "search.sampling 'exact' needs units that do not lie in one another, but granularity is "
                f"{', '.join(self.granularity)}"
            )

    @property
    def explored(self) -> tuple[float, float]:
        """Sparsities that a run speaks of: its masks come from about its own, and worths change further off."""
        low, high = (round(share * self.budget.sparsity, 6) for share in EXPLORED)
        return low, min(high, 0.99)

    @property
    def longest_window(self) -> int:
        """Tokens that the model must take at once."""
        return max(self.data.window, self.initial.window or 0)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        window = self.data.window
        return self.search.chunk or max((size for size in USUAL_CHUNKS if window % size == 0), default=window)

    def _finest(self) -> list[Kind]:
        """Levels that no other chosen level refines: those whose scores decide."""
        return [kind for kind in self.granularity if not any(kind in ANCESTORS[other] for other in self.granularity)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every field explicit; ``make_config`` reads it back to an equal config."""
        return self.model_dump(mode="json")


def make_config(given: Mapping[str, Any]) -> RunConfig:
    """A checked config from nested plain data over the defaults of its preset.

    Raises:
        ConfigError: unknown key (the nearest known one is suggested), wrong type, or a value out of range.
    """
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
    try:
        return RunConfig.model_validate(merge(PRESETS[preset], given))
    except ValidationError as error:
        raise ConfigError(sentence(error, RunConfig)) from None
