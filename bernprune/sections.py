"""The sections of a run's configuration: what each setting is called, its default, its range, and what it means.

What they must have in common is checked by ``bernprune.config.RunConfig``.
"""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from bernprune.embedded import EMBEDDED
from bernprune.names import (
    CUSTOM,
    RIDGES,
    Allocation,
    BaselineName,
    CapName,
    InfluenceName,
    MapName,
    MasksPer,
    Measure,
    MethodName,
    ObjectiveName,
    Pools,
    Projection,
    ReferenceName,
    RepairName,
    Sampling,
    Scaling,
    ScoreName,
    SearchDtype,
    TargetName,
    meant,
    place_of,
    several,
)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        """Where there may be several values, one by itself, or several with commas between them."""
        if get_origin(cls.model_fields[str(info.field_name)].annotation) is not tuple:
            return value
        return [value] if isinstance(value, (int, float)) else several(value)

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """Python gives half surrogates for bytes of a path that are not UTF-8; no file of ours could hold them."""
        texts = value if isinstance(value, (list, tuple)) else [value]
        if any("\ud800" <= character <= "\udfff" for text in texts if isinstance(text, str) for character in text):
            raise ValueError("input should be UTF-8 (or set PYTHONUTF8=1)")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`masks: yes` is 1 to pydantic, and a slip to us."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("input should not be true or false")
        return value


class ModelConfig(Section):
    """Which model, and how it is loaded."""

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


class DataConfig(Section):
    text: str = EMBEDDED
    """Calibration text: .txt, .md, .jsonl (field 'text'), .xz of one, dataset folder, Hugging Face dataset name."""
    eval_text: str | None = None
    """Held-out text for perplexity; by default the last tenth of the calibration text, which is then not learned from;
    for 'embedded' its own held-out part."""
    eval_join: str | None = None
    """Join the rows of the held-out text by this string, for WikiText-2 by "\\n\\n" (the quotes are YAML's, also after
    --set); otherwise each is a text."""
    window: Annotated[int, Field(ge=2)] = 128
    """Tokens in a window, in search and evaluation."""
    max_characters: Count = 64_000_000
    """Characters of the calibration text that are read, at most."""
    eval_tokens: Count = 131_072
    """Tokens to which the evaluation text is cut."""


class BudgetConfig(Section):
    sparsity: Share = 0.3
    """Share of the prunable cost to remove."""
    measure: Measure = "parameters"
    """Cost that budget.sparsity is a share of: parameters, or forward FLOPs per token at budget.flops_window."""
    flops_window: Count = 2048
    """Sequence length at which attention FLOPs are counted."""
    pools: Pools = "joint"
    """'joint': one budget over all units; 'separate': each kind loses the same share (published)."""
    also_parameters: Share | None = None
    """Share of the prunable parameters that must go at least, besides the sparsity of another measure."""
    also_flops: Share | None = None
    """Share of the prunable forward FLOPs that must go at least, besides the sparsity of another measure."""
    also_kv_cache: Share | None = None
    """Share of the prunable key/value cache that must go at least: the policy keeps to it on average, what is
    selected exactly."""
    min_kv_groups: Annotated[int, Field(ge=0)] = 1
    """Least kv groups kept in each layer unless a coarser unit removes the block; the first layer always keeps one."""
    min_channels: Annotated[int, Field(ge=0)] = 1
    """Least channels kept in each layer unless a coarser unit removes the block."""
    channel_multiple: Count = 1
    """Kept channels of each layer are a multiple of this, e.g. 64 or 128 for tensor cores."""

    @property
    def also(self) -> dict[CapName, float]:
        """Other costs, and the share of each that must go."""
        names: tuple[CapName, ...] = get_args(CapName)
        shares = {name: getattr(self, f"also_{name}") for name in names}
        return {name: share for name, share in shares.items() if share is not None}


class InitialConfig(Section):
    score: ScoreName | str = "wanda-sp"
    """Metric that starts the policy (bernprune scores lists them), a .safetensors file of scores, or a metric of one's
    own: FILE.py:NAME, of a function in a Python file, which is executed."""
    also: tuple[ScoreName | str, ...] = ()
    """posterior: other metrics, which the regression of worths on scores looks at besides initial.score."""
    members: tuple[ScoreName | str, ...] = ()
    """rank-average, fused: the metrics that are fused; by default wanda-sp, flap, goa-moment and cfsp."""
    map: MapName = "const"
    """How scores become keep probabilities. 'const': two levels (initial.sharpness), for the best and the others;
    'sigmap': the sigmoid of standardised scores; 'norm': scores scaled to a range of one; 'hybrid': 'norm' for channels
    and 'sigmap' for the rest; 'uniform': the same everywhere."""
    allocation: Allocation | None = None
    """How many units each layer keeps at first: of each kind the same share ('uniform'), the best of each kind in all
    layers ('global') or of all units ('pooled'), more where a layer changes more of what passes through it
    ('block-influence'), or what an evolution finds to lose least ('search'); by default what suits the metric."""
    kv_sparsity: Share | None = None
    """initial.allocation uniform or global: share of the kv groups that goes at first; of the channels then goes what
    the budget needs (FLAP's manual modules, MM). By default the same share of both goes."""
    influence: InfluenceName = "angular"
    """Measure of what a layer changes: the angle, 1 - cosine, or the mean squared or absolute difference."""
    generations: Count = 8
    """initial.allocation search: generations of the evolution after the first. Each runs 18 selections on a quarter of
    the calibration windows, the first one 24."""
    cost_power: Annotated[float, Field(ge=0, le=1)] | None = None
    """Divide scores by this power of what a unit costs, in parameters; by default the metric's own."""
    pairs: Count = 8
    """mini-llm: differences of the loss that are taken of each calibration window, two passes each."""
    step: Annotated[float, Field(gt=0, lt=1)] | None = None
    """mini-llm: how far gates or weights are moved either way for a difference; by default 0.0625 and 0.001."""
    sharpness: Annotated[float, Field(gt=0.5, le=1)] = 0.95
    """initial.map const: keep probability of the best units; that of the others is one minus it."""
    windows: Count = 128
    """Calibration windows that the metric sees."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a window that the metric sees; by default data.window."""
    inputs: Literal["dense", "pruned"] = "dense"
    """Score each layer on the dense model's activations, or on those of the already pruned earlier layers."""

    @field_validator("score", "also", "members")
    @classmethod
    def _are_known(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value:
            known = get_args(ScoreName)
            if name not in known and not name.endswith(".safetensors") and place_of(name) is None:
                raise ValueError(
                    f"score {name!r} is unknown{meant(name, known) or ';'} known are {', '.join(known)}, paths of "
                    ".safetensors files, and custom metrics as FILE.py:NAME"
                )
        return value


class PolicyConfig(Section):
    floor: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Least keep probability."""
    ceiling: Annotated[float, Field(gt=0.5, le=1)] = 0.98
    """Greatest keep probability."""
    projection: Projection = "cost-weighted"
    """How the policy is put on the budget: 'cost-weighted': equal shift, met exactly; 'published': at most that."""


class SearchConfig(Section):
    sequences: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Windows run forward to learn and to choose, reference passes included, but not those of the initial metric, of
    weights that are fitted, and of repairs; by default two a unit, from 8,192 to 240,000. 0: the metric alone. 'auto':
    until search.regret is reached, or eight times the default is spent, 240,000 at most."""
    regret: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """posterior: stop once knowing all units exactly would gain less, in nats per token; by default 0.1 for 'auto'."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stop after this much search time; a run limited so is not repeatable to the bit."""
    method: MethodName | str = "posterior"
    """'posterior': estimate what each unit is worth, in rounds; 'reinforce': follow the gradient (published); or
    FILE.py:NAME, a custom MaskSearch in a Python file, which is executed."""
    masks: Count = 8
    """Masks that compete on the same text, in a step."""
    windows: Count = 8
    """Windows of text in a step."""
    masks_per: MasksPer = "chunk"
    """What has masks of its own: a whole 'batch' of windows (published), each 'sequence', or each 'chunk' of one."""
    sampling: Sampling = "antithetic"
    """Masks on one text: 'independent' (published), 'antithetic' (opposed), or 'exact' (on the budget; biased)."""
    chunk: Count | None = None
    """Tokens of a chunk; by default the largest divisor of data.window from 8 to 32, or else the whole window."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of the next chunk's loss that a chunk's mask answers for, its square of the one after that, and so on; 1 is
    unbiased, and noisy."""
    rounds: Count | None = None
    """posterior, and custom methods: rounds, each of which renews the policy; by default one for every 128
    windows of text."""
    forgetting: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """posterior: share of what was known of whole layers that a round forgets."""
    swing: Annotated[float, Field(ge=0, le=1)] = 1.0
    """posterior: how far masks of the first round keep more or fewer of a layer's channels; round r an r-th of it."""
    by_activity: bool = True
    """posterior: learn of channels where they are active, in one more pass over the text; not for masks of a batch."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """reinforce, and custom methods: first step size; falls to zero along a cosine."""
    baseline: BaselineName | str = "leave-one-out"
    """reinforce: what is subtracted from the losses; or FILE.py:NAME, a custom baseline."""
    reference: ReferenceName = "initial"
    """reinforce, and custom methods that need a reference: what 'matched', or a custom baseline, compares
    with: 'initial' or 'current' selection, 'dense' model, 'mean-field' gates."""
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
    what six looks take, at most three tenths; a tenth for other methods than posterior; nothing with search.refit, as
    repair chooses."""
    final_windows: Annotated[int, Field(ge=2)] = 128
    """Windows on which the last two of a race of selections are compared."""
    look_windows: Annotated[int, Field(ge=2)] = 8
    """posterior: windows on which single changes to the selection are tried."""
    refit: bool | None = None
    """Run masks on weights that are refitted whenever the policy has changed, so that the search, too, leaves out of
    account what a repair will make up for. By default, where a repair follows that refits weights (repair.method auto,
    ridge, two-step or admm); not for search.objective kl, search.reference dense, search.dtype int8, or blocks
    alone."""
    dtype: SearchDtype = "auto"
    """Number format of the weights that are searched on: the 'same', 'bfloat16', or 'int8' (weights alone, by torchao);
    'auto': bfloat16 on processors with units for it, for models in float32 with ten million prunable parameters or
    more whose model.dtype is auto, otherwise the same. What is sliced and reported is the model itself."""
    objective: ObjectiveName | str = "cross-entropy"
    """Loss of a mask: 'cross-entropy', 'kl' to the dense model's predictions; or FILE.py:NAME, a function of logits
    [N, V], of the next tokens [N] and, if it takes a third, of the dense model's logits, that gives losses [N]."""
    non_finite: Literal["error", "drop"] = "error"
    """What a loss that is not finite does: stop the run, or drop its mask from the step; such a finalist just loses."""
    rows_per_forward: Count | Literal["auto"] = "auto"
    """Most windows in one forward pass; 'auto': 64, on a GPU fewer or more as its memory allows."""
    costs: Literal["measured", "fixed"] = "measured"
    """Costs by which the way of running masks is chosen; always 'fixed' under ten million prunable parameters."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints of the search, each after a whole step; the final choice is saved after each heat."""
    checkpoint_steps: Count | None = None
    """Also write a checkpoint every so many steps."""

    @field_validator("method", "baseline", "objective")
    @classmethod
    def _are_known(cls, value: str, info: ValidationInfo) -> str:
        names = {"method": MethodName, "baseline": BaselineName, "objective": ObjectiveName}[str(info.field_name)]
        if value not in get_args(names) and place_of(value) is None:
            known = ", ".join(map(repr, get_args(names)))
            raise PydanticCustomError("literal_error", f"Input should be {known} or {CUSTOM}")
        return value


class RepairConfig(Section):
    method: RepairName = "auto"
    """How what is kept makes up for what is removed, in closed form. In the two projections that add to the residual
    stream it refits the 'bias', the weights by 'ridge' regression or by 'admm', or one 'scale' a unit. 'two-step' also
    refits those before them; 'auto' takes the best of ridge and two-step by loss on text not fitted on, or none."""
    windows: Annotated[int, Field(ge=2)] | None = None
    """Calibration windows of the repair; by default 128, or as many as hold 24 tokens to fit on for each input of the
    widest projection. One in four chooses the ridge. As many others judge, 256 at most, if the text has them."""
    target: TargetName = "residual"
    """ridge, two-step, admm: a projection's outputs are fitted to its 'own' on the same inputs, to those of the 'dense'
    model, or to what makes the 'residual' stream the dense one's, in which errors count as shares of that stream."""
    ridges: Annotated[tuple[Positive, ...], Field(min_length=1)] = RIDGES
    """ridge, two-step, scale: strengths to choose from, in mean squares of an input."""
    biases: Literal["auto", "never", "always"] = "auto"
    """Whether projections get biases that the family does not know; the saved config then declares them, and other
    engines may not read them. 'auto': for repair.method bias alone, which is nothing without."""
    judge_finalists: bool | None = None
    """Repair every finalist of the search, and keep the one with the least loss afterwards; by default with
    search.refit."""


class RecoverConfig(Section):
    """Settings of ``bernprune recover``, which trains what a run kept; prune does not read them."""

    tokens: Count = 2_000_000
    """Tokens to train on, at most, in whole steps, and in one at least."""
    rank: Count = 8
    """Rank of the adapters, in the mean over layers."""
    ranks: Literal["influence", "uniform"] = "influence"
    """Ranks of layers: more where one of the dense model changes more of what passes through it (initial.influence), or
    all alike."""
    scale: Positive = 2.0
    """Factor of what adapters add."""
    learning_rate: Positive = 3e-4
    """Highest step size; models of a few million parameters take ten times as much, or more."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the step size rises; then it falls along a cosine."""
    batch: Count = 16
    """Windows in a step."""
    rows: Count = 8
    """Most windows in one pass."""
    recompute: bool = False
    """Compute activations again on the way back: less memory, a third more time."""
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the divergence from the dense model's predictions in the loss; above 0 that model stays in memory."""
    masks: Literal["plan", "policy"] = "plan"
    """'plan': train the run's model. 'policy': train the dense one before the cut, repairs aside, under masks that the
    learned policy draws, nearer to the plan's from step to step; then cut."""
    held_out: Annotated[int, Field(ge=2)] = 64
    """Windows at the end of the text that are not trained on, and by which the best state is chosen."""
    evaluate_steps: Count | None = None
    """Steps between evaluations on the held-out windows; by default a twentieth of all steps."""
    patience: Count = 5
    """Evaluations without a lower loss, after which the training ends."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints."""


class PlansConfig(Section):
    sparsities: tuple[Share, ...] = ()
    """Other sparsities for which a plan is written and evaluated, from half the run's own to one and a half of it."""
    nested: bool = False
    """Whether each plan contains, or is contained in, what the run keeps."""


class ReportConfig(Section):
    latency_rows: Count = 8
    """Windows in the batch that latency is measured on."""
    latency_repeats: Annotated[int, Field(ge=2)] = 20
    """Passes that are timed for a latency."""
    initial_latency: bool = True
    """Also time the initial metric's model, for which the dense one is loaded once more."""
