"""Searches, baselines and losses of one's own in a run, by the place where they stand."""

import hashlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tiny_run import (
    METHODS,
    NO_CHUNKS,
    REPOSITORY,
    STEPS,
    Place,
    in_one_sentence,
    read_json,
    run,
    same_run,
    settings,
    steps_of,
    succeed,
    without_times,
)
from tolerances import LOGITS, assert_close

from bernprune.config import make_config
from bernprune.custom import code_digest, defined_at
from bernprune.errors import ConfigError, RunError
from bernprune.losses import token_loss
from bernprune.models.view import describe
from bernprune.objective import masked_objective
from bernprune.run.checkpoint import check_state
from bernprune.run.folder import RunFolder
from bernprune.run.methods import METHODS as METHODS_OF_RUNS
from bernprune.run.methods import check_methods, reads_activity, runs_reference
from bernprune.run.searches import make_search
from bernprune.run.workload import make_budget, plan_work
from bernprune.settings import absolute

OWN = '''
from pathlib import Path

import torch
import torch.nn.functional as F

from bernprune import MaskSearch, PosteriorSearch, ReinforceSearch
from bernprune.policy.baselines import LeaveOneOut, less_the_others

STOP = Path(__file__).with_suffix(".stop")


class Signs(MaskSearch):
    """Moves every unit by the sign of its gradient, and counts its steps; nothing of it is bernprune's."""

    steps, notes = 0, {}

    def tell(self, masks_BKCU, losses_BKC, *, learning_rate, reference_BC=None, reading=None):
        if self.steps == 5 and STOP.exists():
            raise KeyError("stopped")
        before_U, advantages_BKC = self.probs_U, less_the_others(losses_BKC)
        found_U = torch.einsum("bkc,bkcu->u", advantages_BKC, masks_BKCU[:].double() - before_U) / self.contrasts_U
        moved_U = before_U - learning_rate * found_U.sign() / (1 + self.steps)
        self.probs_U = self.budget.project(moved_U, floor=0.02, ceiling=0.98)
        self.steps, self.notes = self.steps + 1, {"last": {"half": losses_BKC.mean().bfloat16()}}
        return self.stats(losses_BKC, advantages_BKC, before_U)

    def state_dict(self):
        return super().state_dict() | {"steps": self.steps, "notes": self.notes}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.steps, self.notes = state["steps"], state["notes"]


class Compared(Signs):
    needs_reference = True

    def tell(self, masks_BKCU, losses_BKC, *, learning_rate, reference_BC=None, reading=None):
        assert reference_BC.shape == losses_BKC[:, 0].shape
        return super().tell(masks_BKCU, losses_BKC - reference_BC[:, None], learning_rate=learning_rate)


class Reads(Signs):
    """Goes as far as channels are active under what would be kept now."""

    needs_reading = True

    def tell(self, masks_BKCU, losses_BKC, *, learning_rate, reference_BC=None, reading=None):
        seen = []
        reading.look(lambda layer, windows, hidden_RTF: seen.append(hidden_RTF.abs().mean().item()))
        return super().tell(masks_BKCU, losses_BKC, learning_rate=learning_rate * sum(seen))


class Posterior(PosteriorSearch):
    pass


class Reinforce(ReinforceSearch):
    pass


class Greedy(Signs):
    needs_reference = needs_reading = True


class Silent(MaskSearch):
    pass


class Reading(Signs):
    needs_reading = True


class Mute(Signs):
    def diagnose(self, scores_U):
        return None


class Vague(Signs):
    def diagnose(self, scores_U):
        return {"where": scores_U}


class Called(Signs):
    """Calls what it knows as the built-in searches do."""

    knows = {}

    def diagnose(self, scores_U):
        return self.knows


class Agrees(Called):
    knows = {"agreement": 0.5}


class Doubts(Called):
    knows = {"signal_to_noise": {"channel": None}}


class Regrets(Called):
    knows = {"regret": None}


class Gapes(Called):
    knows = {"gap": "wide"}


class Hopeful(Called):
    knows = {"regret": -0.5}


class Half(Called):
    knows = {"agreement": {"channel": 1}, "regret": 0}


class Endless(Signs):
    def diagnose(self, scores_U):
        return {"where": float("inf")}


class Alone(Signs):
    def state_dict(self):
        return {"steps": self.steps}


class Unsaved(Signs):
    seen = {1, 2}

    def state_dict(self):
        return super().state_dict() | {"seen": self.seen}


class Later(Unsaved):
    @property
    def seen(self):
        return {3} if self.steps else []


class Nothing(MaskSearch):
    def tell(self, masks_BKCU, losses_BKC, *, learning_rate, reference_BC=None, reading=None):
        pass


class Lost(Signs):
    def tell(self, masks_BKCU, losses_BKC, **given):
        stats = super().tell(masks_BKCU, losses_BKC, **given)
        self.probs_U = self.probs_U * float("nan")
        return stats


class Beyond(Signs):
    def tell(self, masks_BKCU, losses_BKC, **given):
        stats = super().tell(masks_BKCU, losses_BKC, **given)
        self.probs_U = self.probs_U + 1
        return stats


class Fewer(Signs):
    def tell(self, masks_BKCU, losses_BKC, **given):
        stats = super().tell(masks_BKCU, losses_BKC, **given)
        self.probs_U = self.probs_U[1:]
        return stats


class Overdrawn(Signs):
    def draw(self, random):
        return super().draw(random)[:3]


class Listed(Signs):
    @property
    def priorities_U(self):
        return [1.0]


class Amnesiac(Signs):
    def load_state_dict(self):
        pass


class Short(Signs):
    def tell(self, masks_BKCU, losses_BKC):
        pass


class Unseeded(Signs):
    def __init__(self, budget, probs_U, *, design):
        super().__init__(budget, probs_U, seed=0, design=design)


class Unbegun(Signs):
    def begin(self, budget, probs_U, **given):
        return self


class Unrounded(PosteriorSearch):
    def __init__(self, budget, probs_U, scores_US, *, seed, design):
        super().__init__(budget, probs_U, scores_US, seed=seed, design=design, round_steps=2)


class Leaves(Nothing):
    def tell(self, *given, **others):
        raise SystemExit(0)


class Opens(Nothing):
    def tell(self, *given, **others):
        open("nowhere")


class Bounded(Signs):
    @classmethod
    def begin(cls, budget, probs_U, *, seed, design, floor, ceiling, discount, scores_US, **others):
        assert (floor, ceiling, discount) == (0.1, 0.9, 0.7) and scores_US.shape == (len(probs_U), 2), others
        return cls(budget, probs_U, seed=seed, design=design)


class Liar(Signs):
    def __init__(self, *given, **others):
        super().__init__(*given, **others)
        self.needs_reference = True


class Elsewhere(Signs):
    @classmethod
    def begin(cls, *given, **others):
        return 3


class Others(LeaveOneOut):
    pass


class Trained(LeaveOneOut):
    def advantages(self, losses_BKC, reference_BC):
        return super().advantages(losses_BKC, reference_BC).requires_grad_()


class Unlike(LeaveOneOut):
    def advantages(self, losses_BKC, reference_BC):
        return losses_BKC[:, 0]


class Parts:
    needs_reference = False

    def advantages(self, losses_BKC, reference_BC):
        return losses_BKC


class Plain(Parts):
    min_masks = 1
    __init__ = lambda self, window, masks: None
    state_dict = lambda self: {}
    load_state_dict = lambda self, state: None


class Many(LeaveOneOut):
    min_masks = 99


class Uncounted(LeaveOneOut):
    min_masks = "two"


class Whole(LeaveOneOut):
    def advantages(self, losses_BKC, reference_BC):
        return losses_BKC.long()


class Unknown(LeaveOneOut):
    def advantages(self, losses_BKC, reference_BC):
        return losses_BKC * float("nan")


class Alike(LeaveOneOut):
    def advantages(self, losses_BKC):
        return losses_BKC


class Perhaps(LeaveOneOut):
    needs_reference = "yes"


class Broken(LeaveOneOut):
    def advantages(self, losses_BKC, reference_BC):
        return {}["mine"]


def surprise(logits_NV, targets_N):
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


def divergence(logits_NV, targets_N, dense_NV):
    ours, theirs = logits_NV.log_softmax(-1), dense_NV.log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


def one(logits_NV): return logits_NV.sum(-1)
def mean(logits_NV, targets_N): return F.cross_entropy(logits_NV, targets_N)
def whole(logits_NV, targets_N): return targets_N
def number(logits_NV, targets_N): return 3.0
def raises(logits_NV, targets_N): return logits_NV[targets_N, 10**6]
'''
SHORT = ("search.sequences=66",)  # eight steps, read, and a probe
PLAIN = ("search.sequences=50",)  # eight steps that are not read, and a probe
OURS = (
    "search.by_activity=false",
    "search.discount=1",
    "policy.floor=0.1",
    "search.swing=0",
    "search.forgetting=0.3",
)
TUNED = ("search.baseline=matched", "search.reference=current", "policy.floor=0.1", "search.scaling=raw")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


# Runs


@pytest.mark.parametrize(
    ("like", "mine"),
    [
        ((), ("search.objective={}:surprise",)),
        ((), ("search.method={}:Posterior",)),
        (("search.masks_per=batch", NO_CHUNKS), ("search.masks_per=batch", NO_CHUNKS, "search.method={}:Posterior")),
        ((*OURS, *PLAIN), (*OURS, *PLAIN, "search.method={}:Posterior")),
        (METHODS["reinforce"], (*METHODS["reinforce"], "search.baseline={}:Others")),
        (METHODS["reinforce"], (*METHODS["reinforce"], "search.baseline={}:Trained")),
        ((*METHODS["reinforce"], *TUNED), (*METHODS["reinforce"], *TUNED, "search.method={}:Reinforce")),
    ],
    ids=["objective", "search", "batch", "settings", "baseline", "trained", "gradients"],
)
def test_what_is_like_ours_runs_like_it(like: tuple[str, ...], mine: tuple[str, ...], own: Path, place: Place) -> None:
    """To the bit: with as many sequences, over the same masks and text."""
    outs = [place.folder / "theirs", place.folder / "mine"]
    for out, given in zip(outs, (like, [setting.format(own) for setting in mine]), strict=True):
        succeed(*place.prune(*given, out=out))
    records = [without_times(out / "metrics.jsonl") for out in outs]
    for record in records[1]:  # which a method of one's own may use
        if "Posterior" in str(mine):
            assert record.pop("learning_rate") > 0
    assert records[0] == records[1]
    assert (outs[0] / "plan.json").read_bytes() == (outs[1] / "plan.json").read_bytes()


@pytest.mark.parametrize("name", ["Signs", "Compared"])
def test_a_search_of_custom_learns(name: str, own: Path, place: Place) -> None:
    """In a run as it ships, with weights fitted to its policy and finalists judged after a repair."""
    given = ("repair.method=ridge", "search.sequences=200", "initial.score=random", "repair.windows=16")
    succeed(*place.prune(f"search.method={own}:{name}", *given))
    losses = [record["loss"] for record in without_times(place.out / "metrics.jsonl")]
    assert len(losses) == (200 - 2) // (8 if name == "Compared" else 6)
    report = read_json(place.out / "report.json")
    assert report["search"]["kept"] in ("learned", "widths", "initial", "uniform")
    assert report["diagnostics"]["gap"] and report["verified"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("name", ["Signs", "Reads"])
def test_a_run_that_fails_in_custom_code_goes_on(name: str, own: Path, place: Place) -> None:
    """The fault is told with its line, what was done is kept, and the end is that of a run that never failed."""
    given = [f"search.method={own}:{name}", *(SHORT if name == "Reads" else PLAIN), "search.checkpoint_steps=1"]
    own.with_suffix(".stop").touch()
    told = in_one_sentence(run(*place.prune(*given)))
    line = OWN.splitlines().index('            raise KeyError("stopped")') + 1
    assert f"search {own}:{name} failed in line {line}: KeyError: 'stopped'" in told
    own.with_suffix(".stop").unlink()
    assert succeed("resume", str(place.out)).err == ""
    succeed(*place.prune(*given, out=place.folder / "undisturbed"))
    same_run(place.out, place.folder / "undisturbed")


def test_a_run_has_its_code_once(own: Path, place: Place) -> None:
    """Who edits the file meanwhile does not change what it does, nor what it says that it ran."""
    changing = (
        OWN.replace("losses_N", "losses")
        + f"""
def rewrites(logits_NV, targets_N):
    Path({str(own)!r}).write_text("1 / 0")
    return surprise(logits_NV, targets_N)
"""
    )
    own.write_text(changing)
    choice = ("search.sequences=200", "search.selection=0.4")
    succeed(*place.prune(*choice, f"search.objective={own}:rewrites"))
    assert own.read_text() == "1 / 0"
    digest = hashlib.sha256(changing.encode()).hexdigest()[:16]
    assert read_json(place.out / "versions.json")[str(own)] == digest
    succeed(*place.prune(*choice, out=place.folder / "theirs"))
    assert (place.out / "plan.json").read_bytes() == (place.folder / "theirs" / "plan.json").read_bytes()


def test_what_lies_beside_a_file_is_found(own: Path, place: Place) -> None:
    """And blamed by its own name."""
    (own.parent / "beside_mine.py").write_text("def fails(): raise OSError('no luck')\n")
    unlucky = "class Unlucky(Nothing):\n    tell = lambda *given, **others: fails()\n"
    own.write_text(f"{OWN}\nfrom beside_mine import fails\n\n\n{unlucky}")
    path = list(sys.path)
    told = in_one_sentence(run(*place.prune(*PLAIN, f"search.method={own}:Unlucky")))
    assert f"Unlucky failed in line 1 of {own.parent / 'beside_mine.py'}: OSError: no luck" in told
    assert sys.path == path


def test_a_plain_search_is_told_what_is_configured(own: Path, place: Place) -> None:
    more = ("policy.floor=0.1", "policy.ceiling=0.9", "search.discount=0.7", "initial.also=[flap]")
    assert succeed(*place.prune(*PLAIN, *more, f"search.method={own}:Bounded")).err == ""


def test_a_search_of_custom_does_not_settle(own: Path, place: Place) -> None:
    """Whatever it says that it expects to gain: no limit of that can be given."""
    succeed(*place.prune(*PLAIN, f"search.method={own}:Signs"))
    steps = steps_of(place.out)
    succeed(*place.prune(*PLAIN, f"search.method={own}:Hopeful", out=place.folder / "hopeful"))
    assert steps_of(place.folder / "hopeful") == steps


def test_what_is_known_in_part_is_kept_and_not_shown(own: Path, place: Place) -> None:
    told = succeed(*place.prune(*PLAIN, f"search.method={own}:Half")).out
    assert read_json(place.out / "report.json")["diagnostics"]["agreement"] == {"channel": 1}
    assert "in the last round two halves" not in told


def test_a_run_goes_on_with_other_code_but_says_so(own: Path, place: Place) -> None:
    own.with_suffix(".stop").touch()
    assert run(*place.prune(f"search.method={own}:Signs", *PLAIN, "search.checkpoint_steps=1")).code == 2
    own.write_text(OWN + "\n# mended\n")
    own.with_suffix(".stop").unlink()
    told = succeed("resume", str(place.out)).err
    assert f"the run began with {own} " in told and "may not go on to the bit" in told


def test_a_run_is_forecast_with_custom_code(own: Path, place: Place) -> None:
    given = settings("data.window=16", f"search.method={own}:Signs", f"search.objective={own}:divergence")
    told = succeed("units", str(place.model), *given, "--set", "search.refit=false").out
    assert "s of search for" in told
    told = succeed("units", str(place.model), *given, *settings("search.refit=false", "search.seconds=9")).out
    assert re.search(r"about 9 s of search for [\d,]+ sequences of 16 tokens, as search.seconds says", told)
    assert "must define tell" in in_one_sentence(
        run("units", str(place.model), *settings("data.window=16", f"search.method={own}:Silent"))
    )


def test_the_example_of_the_readme_runs(place: Place) -> None:
    """As it stands there, and by the commands that stand there, but for what makes them short."""
    text = (REPOSITORY / "bernprune" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n# (mine\.py)\n(.*?)```", text, re.DOTALL)
    place.file(*example)
    command, other = re.findall(r"bernprune prune (--out out/\S+ .*mine\.py.*)\n", text)
    short = place.prune(*PLAIN, "repair.method=ridge", "repair.windows=8", "initial.windows=8")
    succeed(*short, *shlex.split(command))
    succeed(*short, *settings(NO_CHUNKS), *shlex.split(other))
    assert RunFolder(Path("out/halves")).read_config().search.baseline.endswith("mine.py:Halves")
    config = RunFolder(Path("out/mine")).read_config()
    named = (config.initial.score, config.search.objective, config.search.method)
    assert [name.rpartition("/")[2] for name in named] == ["mine.py:squares", "mine.py:focal", "mine.py:Signs"]
    assert read_json(Path("out/mine/report.json"))["search"]["steps"] == STEPS


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("posterior", {"forgetting": 0.3, "by_activity": False, "discount": 0.7}),
        ("reinforce", {"scaling": "raw", "epsilon": 0.0, "pull": 0.2, "discount": 0.7}),
    ],
)
def test_a_search_is_made_as_configured(method: str, given: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """With each setting that it knows."""
    told: dict[str, object] = {}

    class Noting(METHODS_OF_RUNS[method]):  # type: ignore[misc, name-defined]
        def __init__(self, *first: object, **named: object) -> None:
            super().__init__(*first, **named)
            told.update(named)

    monkeypatch.setitem(METHODS_OF_RUNS, method, Noting)
    policy, search = {"floor": 0.03, "ceiling": 0.9}, {"method": method, **given}
    config = make_config({"data": {"window": 16}, "policy": policy, "seed": 5, "search": search})
    space = describe(tiny_model("llama")).space
    probs_U = torch.full((space.size,), 0.7, dtype=torch.float64)
    make_search(config, make_budget(config, space), probs_U, probs_U[:, None])
    assert told.items() >= {**policy, **given, "seed": 5}.items()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a.b is tensor"),
        ({"a": [torch.ones(1)]}, "a is [tensor"),
        ({"a": {1: 2}}, "a is {1: 2}"),
        ({"a": {"tensor": 2}}, "a is {'tensor': 2}"),
    ],
    ids=["one-name", "list", "number", "reference"],
)
def test_what_would_come_back_as_something_else_is_not_saved(state: dict[str, object], said: str) -> None:
    with pytest.raises(RunError, match="which cannot be saved") as caught:
        check_state(state)
    assert str(caught.value).startswith(said)


# Losses


def test_a_loss_of_custom_may_ask_the_dense_model(own: Path) -> None:
    """It is what it says, at each token whose next one is in the window; logits come in parts."""
    scope: dict[str, Callable[..., torch.Tensor]] = {}
    exec(OWN.replace("__file__", "'mine.py'"), scope)  # type: ignore[arg-type]
    view, tokens_BT = describe(tiny_model("llama", torch.float32)), random_tokens(3, 9)
    masks_KU = torch.rand(2, view.space.size, generator=torch.Generator().manual_seed(1)) < 0.7
    masks_BKCU = masks_KU[None, :, None].expand(3, -1, -1, -1)
    found = {}
    for kind in ("kl", scope["divergence"], "cross-entropy", scope["surprise"]):
        with masked_objective(view, kind=kind) as objective:  # type: ignore[arg-type]
            found[getattr(kind, "__name__", kind)] = objective.token_losses(masks_BKCU, tokens_BT)
            shares_BKT = objective.token_shares(masks_BKCU, tokens_BT)
            assert_close(shares_BKT.sum(-1).mean(0), objective.losses(masks_KU, tokens_BT), LOGITS[torch.float32])
    assert_close(found["divergence"][..., :-1], found["kl"][..., :-1], LOGITS[torch.float32])
    assert_close(found["surprise"], found["cross-entropy"], LOGITS[torch.float32])
    assert not found["divergence"][..., -1].any() and found["kl"][..., -1].all()


def test_what_a_loss_may_take() -> None:
    """Two or three things; what has a value of its own is left alone."""

    def optional(logits: torch.Tensor, targets: torch.Tensor, weight: float = 2.0) -> torch.Tensor:
        return weight * logits[:, 0]

    assert not token_loss(optional).needs_dense
    assert token_loss(lambda a, b, c: a).needs_dense
    assert not token_loss(lambda a, b, *others: a).needs_dense
    wrong = {
        "1": lambda a: a,
        "4": lambda a, b, c, d: a,
        "0": lambda: 1,
        "what cannot be told": lambda *every: every[0],
        "c by name": lambda a, b, *, c: a,
    }
    for takes, function in wrong.items():
        with pytest.raises(ConfigError, match=f"must take logits, next tokens and, .* takes {takes}$"):
            token_loss(function)


def test_the_dense_model_is_counted(own: Path) -> None:
    """As sequences that are run forward: a pass over each window for its predictions."""
    base = {"model": {"path": "embedded"}, "search": {"refit": False}}
    space = describe(tiny_model("llama")).space
    counts = [
        plan_work(
            make_config({**base, "search": {**base["search"], "objective": f"{own}:{name}"}}), space
        ).step_sequences
        for name in ("surprise", "divergence")
    ]
    assert counts[1] - counts[0] == make_config(base).search.windows


# What is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("search.method=mine.py", "should be 'posterior', 'reinforce' or FILE.py:NAME, but got 'mine.py'"),
        ("search.method=posteriro", "but got 'posteriro'; did you mean 'posterior'?"),
        ("search.method=nothing.py:Signs", "nothing.py does not exist"),
        ("search.method={}:Sings", "has no 'Sings'; did you mean 'Signs'?"),
        ("search.method={}:surprise", "surprise must be a subclass of bernprune.MaskSearch, but is 'surprise'"),
        ("search.method={}:Silent", "Silent must define tell"),
        ("search.method={}:Greedy", "Greedy may need a reference or a reading of the text, but needs both"),
        ("search.method={}:Liar", "Liar must have needs_reference False with these masks, as its class says"),
        (
            "search.method={}:Reading search.masks_per=batch search.chunk=null",
            "needs a reading of the text, which",
        ),
        ("search.method={}:Alone", "Alone must keep in state_dict what MaskSearch does: fingerprint, budget, probs_U"),
        ("search.method={}:Unsaved", "must keep in state_dict what can be saved, but seen is {1, 2}, which cannot be"),
        ("search.method={}:Later", "search.seen is {3}, which cannot be saved"),
        ("search.method={}:Nothing", "Nothing must give a StepStats in tell, but gave None"),
        ("search.method={}:Mute", "Mute must give a dictionary in diagnose, but gave None"),
        ("search.method={}:Vague", "Vague must give plain data in diagnose, but Object of type Tensor is not JSON"),
        ("search.method={}:Endless", "Endless must give plain data in diagnose, but Out of range float values"),
        ("search.method={}:Agrees", "Agrees must give agreement in diagnose for each kind, but gave 0.5"),
        ("search.method={}:Doubts", "Doubts must give signal_to_noise in diagnose for each kind, but gave {'channel'"),
        ("search.method={}:Regrets", "Regrets must give a number as regret in diagnose, but gave None"),
        ("search.method={}:Gapes", "Gapes must give a number as gap in diagnose, but gave 'wide'"),
        ("search.method={}:Lost", "in [0, 1], but left nan to nan in step 0"),
        ("search.method={}:Beyond", "in [0, 1], but left 1."),
        ("search.method={}:Fewer", "in [0, 1], but left torch.Size(["),
        ("search.baseline={}:Alike", "Alike must take returns and those of a reference in advantages, but too many"),
        ("search.baseline={}:Perhaps", "Perhaps must say by True or False whether it needs_reference"),
        ("search.method={}:Overdrawn", "numbers as draw, one a unit, but gave torch.Size([3])"),
        ("search.method={}:Listed", "numbers as priorities_U, one a unit, but gave [1.0]"),
        ("search.method={}:Amnesiac", "Amnesiac must take in load_state_dict what MaskSearch does, but too many"),
        ("search.method={}:Short", "Short must take in tell what MaskSearch does, but got an unexpected keyword"),
        ("search.method={}:Unseeded", "Unseeded must take in __init__ what MaskSearch does, but got an unexpected"),
        ("search.method={}:Unbegun", "Unbegun must have a classmethod for its begin, but has <function"),
        ("search.method={}:Unrounded", "Unrounded must take in __init__ what PosteriorSearch does, but got an unexp"),
        ("search.baseline={}:Uncounted", "Uncounted' must have an integer min_masks, but has 'two'"),
        ("search.method={}:Leaves", "Leaves failed in line"),
        ("search.method={}:Opens", "FileNotFoundError"),
        (
            "search.method={}:Posterior search.pull=0.1",
            "is a PosteriorSearch, and search.pull has no meaning",
        ),
        (
            "search.method={}:Posterior policy.projection=published",
            "and search.method 'posterior' needs",
        ),
        ("search.method={}:Signs search.forgetting=0.2", "search.forgetting has no meaning for search.method"),
        ("search.method={}:Signs search.baseline=none", "search.baseline has no meaning for search.method"),
        ("search.method={}:Signs search.sequences=auto", "needs search.method 'posterior'"),
        ("search.baseline={}:Parts", "a class of baselines, but lacks min_masks, state_dict, load_state_dict"),
        ("search.baseline={}:Plain search.sampling=antithetic", "or a subclass of LeaveOneOut, not"),
        ("search.baseline={}:Unlike", "baseline Unlike must give advantages [1, 3, 1], but gave"),
        ("search.method={}:Elsewhere", "Elsewhere must begin as a MaskSearch, but began as 3"),
        ("search.baseline={}:Signs", "Signs must be a class of baselines, but lacks min_masks, advantages"),
        ("search.baseline={}:Many", "needs at least 99 masks a step, but got 3"),
        ("search.baseline={}:Whole", "Whole must give finite floating-point advantages, but gave int64, not all of"),
        ("search.baseline={}:Endless", "Endless must be a class of baselines"),
        (
            "search.baseline={}:Unknown",
            "Unknown must give finite floating-point advantages, but gave float64, not all of",
        ),
        ("search.baseline={}:Broken", "Broken failed in line"),
        ("search.objective={}:one", "one must take logits, next tokens and"),
        ("search.objective={}:Signs", "Signs must be a function, but is 'Signs'"),
        ("search.objective={}:mean", "mean must give a loss for each of"),
        ("search.objective={}:whole", "of int64"),
        ("search.objective={}:number", "number must give a tensor, but gave 3.0"),
        ("search.objective={}:raises", "raises failed in line"),
        ("search.objective=cross-entropie", "did you mean 'cross-entropy'?"),
    ],
)
def test_what_is_wrong_with_custom_is_told(given: str, said: str, own: Path, place: Place) -> None:
    """In one sentence."""
    more = METHODS["reinforce"] if "baseline" in given else PLAIN
    told = in_one_sentence(run(*place.prune(*more, *given.format(own).split())))
    assert said in told
    assert (place.out / "model").exists() is False


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"method": "reinforce", "sampling": "antithetic", "baseline": "none"}, "needs search.baseline"),
    ],
)
def test_settings_of_other_methods_are_refused(search: dict[str, object], said: str, own: Path) -> None:
    given = {name: value.format(own) if isinstance(value, str) else value for name, value in search.items()}
    with pytest.raises(ConfigError) as caught:
        make_config({"search": given})
    assert said in str(caught.value)


def test_settings_that_custom_may_use(own: Path) -> None:
    """Rounds and step sizes of a search; text, reference and memory of a baseline."""
    assert make_config({"search": {"method": f"{own}:Signs", "rounds": 3, "learning_rate": 0.3}}).search.rounds == 3
    given = {"method": "reinforce", "baseline": f"{own}:Others", "reference": "current", "baseline_window": 7}
    assert make_config({"search": given}).search.reference == "current"
    compared = make_config({"search": {"method": f"{own}:Compared", "reference": "dense"}})
    check_methods(compared)
    for given in ({"method": f"{own}:Signs"}, {"method": f"{own}:Reinforce"}, {"method": "posterior"}):
        with pytest.raises(ConfigError, match=r"search\.reference has no meaning"):
            check_methods(make_config({"search": {**given, "reference": "dense"}}))


def test_dense_weights_are_needed_to_compare_with(own: Path, place: Place) -> None:
    """Weights for the policy replace them."""
    given = (f"search.objective={own}:divergence", "repair.method=ridge")
    assert "give search.refit=false" in in_one_sentence(run(*place.prune(*given)))
    succeed(*place.prune(*given, "search.refit=false", "repair.windows=16", "search.sequences=200"))


def test_the_dense_reference_is_the_model_as_it_is() -> None:
    """So weights do not follow the policy, unless that is asked for, which is refused."""
    given = {"method": "reinforce", "baseline": "matched", "sampling": "independent"}
    assert make_config({"search": given}).search.refit is True
    assert make_config({"search": {**given, "reference": "dense"}}).search.refit is False
    with pytest.raises(ConfigError, match=r"search\.refit has no meaning for search\.reference 'dense'"):
        make_config({"search": {**given, "reference": "dense", "refit": True}})


def test_what_a_class_says_is_planned_with(own: Path) -> None:
    """A pass for a reference, or to read activities where masks are not a whole batch's."""

    def planned(name: str, **search: object) -> tuple[bool, bool]:
        config = make_config({"search": {"method": f"{own}:{name}", **search}})
        return reads_activity(config), runs_reference(config)

    assert planned("Signs") == (False, False) and planned("Compared") == (False, True)
    assert planned("Posterior") == (True, False) and planned("Posterior", by_activity=False) == (False, False)
    assert planned("Reading") == (True, False) and planned("Reinforce") == (False, False)
    assert planned("Posterior", masks_per="batch") == (False, False)


def test_places_are_made_absolute(own: Path, monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    """And stand so in the run's configuration."""
    monkeypatch.chdir(own.parent)
    names = {"method": "mine.py:Signs", "baseline": "mine.py:Others", "objective": "mine.py:surprise"}
    assert absolute({"search": names})["search"] == {key: f"{own.parent}/{name}" for key, name in names.items()}
    assert absolute({"search": {"masks": 3, "method": "posterior"}})["search"] == {"masks": 3, "method": "posterior"}
    succeed(*place.prune(*PLAIN, "search.method=mine.py:Signs"))
    assert RunFolder(place.out).read_config().search.method == f"{own}:Signs"


def test_each_file_has_the_siblings_that_it_has_now(tmp_path: Path) -> None:
    """Those of another folder may have the same names, and they may be edited; a digest is of them, too."""
    (tmp_path / "other").mkdir()
    for folder, value in ((tmp_path, "here"), (tmp_path / "other", "there")):
        (folder / "helper.py").write_text(f"VALUE = {value!r}")
        (folder / "mine.py").write_text("import helper\n\ndef value():\n    return helper.VALUE\n")
    here, there = (str(folder / "mine.py") for folder in (tmp_path, tmp_path / "other"))

    def value(file: str) -> str:
        return defined_at("score", file, "value", callable)()

    assert [value(file) for file in (here, there, here)] == ["here", "there", "here"]
    digests = [code_digest("score", file) for file in (here, there)]
    (tmp_path / "helper.py").write_text("VALUE = 'changed'")
    assert [value(file) for file in (here, there)] == ["changed", "there"]
    assert [code_digest("score", file) == digest for file, digest in zip((here, there), digests, strict=True)] == [0, 1]


def test_code_may_look_for_its_module_later(tmp_path: Path) -> None:
    """As dataclasses with annotations of text do."""
    source = """
from __future__ import annotations

from dataclasses import dataclass


def make():
    @dataclass
    class Made:
        number: int = 3

    return Made()
"""
    (tmp_path / "mine.py").write_text(source)
    assert defined_at("score", str(tmp_path / "mine.py"), "make", callable)().number == 3


def test_code_may_spoil_paths_and_modules(tmp_path: Path) -> None:
    before = list(sys.path)
    (tmp_path / "mine.py").write_text("import sys\nsys.path.clear()\ndel sys.modules[__name__]\nvalue = 3\n")
    assert defined_at("score", str(tmp_path / "mine.py"), "value", callable) == 3 and sys.path == before
