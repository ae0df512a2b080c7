"""Adapters add what they say, training repeats itself and gives back its best, and masks before the cut are the cut's.

Letters: L layers, U units, R rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, Variant, random_plan, random_tokens, tiny_model
from tiny_run import state_of
from tolerances import EXACT, LOGITS, SAMPLED, assert_close

from bernprune.backends import TORCH
from bernprune.data import TokenWindows
from bernprune.errors import LossError, RunError
from bernprune.models.adapters import Adapters, adapted_view
from bernprune.models.families import family_of
from bernprune.models.masking import masked
from bernprune.models.slicing import slice_model
from bernprune.models.view import describe
from bernprune.recovery import SampledMasks, Training, training, whole_ranks
from bernprune.run.checkpoint import read_state, write_state
from bernprune.sections import RecoverConfig

WINDOW = 9


# Ranks


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shares", [[1.0, 1.0, 1.0], [0.1, 0.7, 0.2], [0.0, 0.0, 5.0], [0.3]], ids=str)
def test_ranks_have_their_mean_and_the_order_of_shares(shares: list[float], rank: int) -> None:
    found = whole_ranks(torch.tensor(shares), rank)
    assert sum(found) == rank * len(shares) and min(found) >= 1
    ordered = sorted(zip(shares, found, strict=True))
    assert [rank for _, rank in ordered] == sorted(found)
    if rank > 1 and len(set(shares)) > 1:
        assert ordered[0][1] < ordered[-1][1]


# Adapters


def adapted(model: Any, family: str, rank: int = 2, **named: Any) -> Adapters:
    layers = len(model.model.layers)
    return Adapters(model, family_of(family), [rank + layer for layer in range(layers)], scale=1.5, seed=0, **named)


def disturb(adapters: Adapters, size: float = 0.3) -> None:
    random = torch.Generator().manual_seed(7)
    for parameter in adapters.parameters.values():
        noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        parameter.data = size * noise.to(parameter.dtype)


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_adapters_do_nothing_at_first_and_can_be_merged(variant: Variant, pruned: bool) -> None:
    """And then there is nothing left of them but other weights, those of the layers alone."""
    model = variant.model()
    if pruned:
        model = slice_model(model, random_plan(describe(model).architecture, seed=3))
    tokens = random_tokens(3)
    names, before = set(model.state_dict()), model(tokens).logits.detach()
    outer = {name: value.clone() for name, value in model.state_dict().items() if ".layers." not in name}
    adapters = adapted(model, variant.family)
    assert_close(model(tokens).logits, before, EXACT)
    linears = [name for name in names if name.endswith("proj.weight")]
    assert len(adapters.parameters) == 2 * len(linears)
    assert all(parameter.requires_grad for parameter in adapters.parameters.values())
    disturb(adapters)
    changed = model(tokens).logits.detach()
    assert (changed - before).abs().max() > 1e-3
    merged = adapters.merge()
    assert set(merged.state_dict()) == names and not any(p.requires_grad for p in merged.parameters())
    assert_close(merged(tokens).logits, changed, LOGITS[torch.float64])
    assert all(value.equal(merged.state_dict()[name]) for name, value in outer.items())


def test_what_adapters_add_is_their_product() -> None:
    model = tiny_model("llama")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = adapted(model, "llama")
    disturb(adapters)
    name = "model.layers.2.mlp.up_proj"
    a_RE, b_DR = (adapters.parameters[f"{name}.lora_{part}.default.weight"].detach() for part in "AB")
    assert a_RE.shape == (4, 36) and b_DR.shape == (19, 4)
    found = adapters.merge().state_dict()[f"{name}.weight"]
    assert_close(found - weights[f"{name}.weight"], 1.5 * b_DR @ a_RE, LOGITS[torch.float64])


def test_a_rank_is_no_larger_than_its_projection() -> None:
    """Of 8 outputs, keys have rank 8 at most."""
    model = tiny_model("llama", num_attention_heads=3, num_key_value_heads=1)
    adapters = Adapters(model, family_of("llama"), [11] * 4, scale=1.0, seed=0)
    shapes = {name: tuple(value.shape) for name, value in adapters.parameters.items() if "k_proj" in name}
    assert set(shapes.values()) == {(8, 36), (8, 8)}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_under_the_plans_mask_the_adapted_model_is_what_will_be_cut(variant: Variant) -> None:
    """Masked with its adapters, or merged and sliced."""
    model, tokens = variant.model(), random_tokens(2)
    view = describe(model)
    plan = random_plan(view.architecture, seed=4)
    adapters = adapted(model, variant.family)
    disturb(adapters)
    with masked(adapted_view(view), TORCH) as live:
        live.set(view.space.mask(plan)[None])
        expected = model(tokens).logits.detach()
    assert_close(slice_model(adapters.merge(), plan)(tokens).logits, expected, LOGITS[torch.float64])


# Masks before the cut


class Noted:
    """What masks were set."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def set(self, masks: torch.Tensor) -> None:
        self.masks.append(masks)


def test_masks_go_from_the_policy_to_the_plan() -> None:
    probs_U = torch.tensor([0.1, 0.5, 0.9, 0.3])
    plan_U = torch.tensor([False, True, True, False])
    noted = Noted()
    masks = SampledMasks(noted, probs_U, plan_U, seed=1)  # type: ignore[arg-type]
    for progress, expected_U in ((0.0, probs_U), (0.375, (probs_U + plan_U) / 2), (0.75, plan_U), (1.0, plan_U)):
        assert_close(masks.draw(0, progress, 75_000).double().mean(0), expected_U, SAMPLED)
    assert torch.equal(masks.draw(5, 0.1, 7), masks.draw(5, 0.1, 7))
    assert not torch.equal(masks.draw(5, 0.1, 70), masks.draw(6, 0.1, 70))
    masks.set()
    assert noted.masks[0].equal(plan_U[None])


# Training


@dataclass
class Pupil:
    model: Any
    adapters: Adapters
    training: Training


def text(seed: int = 0) -> torch.Tensor:
    return random_tokens(1, 20 * WINDOW, seed=seed)[0] % 11


def pupil(
    teacher: Any = None, masks: SampledMasks | None = None, held_out: torch.Tensor | None = None, **given: Any
) -> Pupil:
    """A tiny model that learns which few tokens its text is of."""
    model = tiny_model("llama", torch.float32)
    adapters = adapted(model, "llama")
    return Pupil(model, adapters, training_of(model, adapters, teacher, masks, held_out, **given))


def training_of(
    model: Any,
    adapters: Adapters,
    teacher: Any = None,
    masks: SampledMasks | None = None,
    held_out: torch.Tensor | None = None,
    **given: Any,
) -> Training:
    settings = RecoverConfig(
        **{"tokens": 8 * 4 * WINDOW, "batch": 4, "rows": 4, "evaluate_steps": 2, "learning_rate": 0.02, **given}
    )
    train = TokenWindows(text(), window=WINDOW, seed=0)
    judged_WT = text(seed=1).view(-1, WINDOW)[:3] if held_out is None else held_out
    return Training(model, adapters, train, judged_WT, settings, teacher=teacher, masks=masks)


@contextmanager
def masked_pupil() -> Iterator[Pupil]:
    """One that is trained before it is cut."""
    model = tiny_model("llama", torch.float32)
    view = describe(model)
    adapters = adapted(model, "llama")
    plan_U = view.space.mask(random_plan(view.architecture, seed=4))
    with masked(adapted_view(view), TORCH) as live:
        masks = SampledMasks(live, torch.full((view.space.size,), 0.6), plan_U, seed=0)
        yield Pupil(model, adapters, training_of(model, adapters, masks=masks))


def sampled_masks() -> SampledMasks:
    return SampledMasks(Noted(), torch.tensor([0.5, 0.5]), torch.tensor([True, False]), seed=0)  # type: ignore[arg-type]


def run(training: Training) -> list[dict[str, float]]:
    if not training.held_out:
        training.evaluate()
    records = []
    while training.ended is None:
        records.append(training.step())
    return records


@pytest.mark.parametrize("recompute", [False, True])
def test_training_lowers_the_loss_on_held_out_text(recompute: bool) -> None:
    """The loss that it reports is that of the model that it gives; and what it does is the same with less memory."""
    found = pupil(recompute=recompute)
    records, training = run(found.training), found.training
    assert len(records) == training.total == training.steps == 8 and training.tokens == 8 * 4 * WINDOW
    assert sorted(training.held_out) == [0, 2, 4, 6, 8] and training.ended == "all tokens were trained on"
    assert training.held_out[training.best_step] == min(training.held_out.values()) < training.held_out[0] - 0.1
    model, judged_WT = training.finish(), text(seed=1).view(-1, WINDOW)[:3]
    loss = torch.nn.functional.cross_entropy(model(judged_WT).logits[:, :-1].flatten(0, 1), judged_WT[:, 1:].flatten())
    assert_close(loss, training.held_out[training.best_step], LOGITS[torch.float32])
    assert not model.training
    plain = run(pupil().training)
    assert_close([r["loss"] for r in records], [r["loss"] for r in plain], LOGITS[torch.float32])


def test_float16_is_exact_enough_for_large_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by a stream are the smaller, the larger it is, and float16 has none below some size."""
    seen = []

    def noted(parameters: list[torch.Tensor], largest: float) -> torch.Tensor:
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]))
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama", torch.float32)
        model.get_input_embeddings().weight.data *= 1e4 / model.get_input_embeddings().weight.std()
        model = model.to(dtype)
        with monkeypatch.context() as patch:
            if dtype == torch.float32:  # then they need not be larger than they are
                patch.setattr(training, "scale_of_mean", lambda tokens: 1.0)
            training_of(model, adapted(model, "llama")).step()
    assert_close(seen[1], seen[0], LOGITS[torch.float16])


def test_rows_at_once_change_nothing() -> None:
    losses = [[record["loss"] for record in run(pupil(rows=rows).training)] for rows in (4, 3, 1)]
    assert_close(losses[1], losses[0], LOGITS[torch.float32])
    assert_close(losses[2], losses[0], LOGITS[torch.float32])


def test_large_gradients_are_clipped_and_their_norm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a norm of 1, in their direction; small ones stay."""
    told, taken = [], []
    for stretch in (0.1, 300.0):
        training = pupil().training
        loss, parameters = training._loss, training._parameters

        def stretched(tokens_RT: torch.Tensor, loss: Any = loss, stretch: float = stretch) -> torch.Tensor:
            return stretch * loss(tokens_RT)

        def noted(parameters: list[torch.Tensor] = parameters) -> None:
            taken.append(torch.cat([each.grad.flatten() for each in parameters if each.grad is not None]))

        monkeypatch.setattr(training, "_loss", stretched)
        monkeypatch.setattr(training._optimizer, "step", noted)
        told.append(training.step()["gradient_norm"])
    small, large = (gradient.norm().item() for gradient in taken)
    assert told == pytest.approx([small, 3000 * small], rel=1e-4) and small < 1 < told[1]
    assert large == pytest.approx(1, rel=1e-4)
    assert_close(taken[1] / large, taken[0] / small, LOGITS[torch.float32])


def test_steps_rise_and_fall() -> None:
    training = pupil(tokens=100 * 4 * WINDOW, warmup=0.1).training
    rates = [training.learning_rate(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert 8 <= peak <= 10 and rates[peak] > 0.97 * 0.02 and rates[0] < 0.0021
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("before_the_cut", [False, True], ids=["plan", "policy"])
def test_training_may_stop_and_go_on(stop: int, before_the_cut: bool, tmp_path: Path) -> None:
    """To the last bit, whatever came between; nothing of a state that was stored changes with the training."""
    make = masked_pupil if before_the_cut else lambda: nullcontext(pupil())
    with make() as whole:
        records = run(whole.training)
    with make() as first:
        first.training.evaluate()
        begun = [first.training.step() for _ in range(stop)]
        state = first.training.state_dict()
        write_state(tmp_path / "state.safetensors", state)
        first.training.step()  # of which nothing may be left
        write_state(tmp_path / "later.safetensors", state)
    assert state_of(tmp_path / "later.safetensors") == state_of(tmp_path / "state.safetensors")
    with make() as second:
        second.training.load_state_dict(read_state(tmp_path / "state.safetensors"))
        assert begun + run(second.training) == records
    states = [each.training.finish().state_dict() for each in (whole, second)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    assert before_the_cut == (records != run(pupil().training))


def test_losses_are_in_order_in_training_that_goes_on(tmp_path: Path) -> None:
    """Of ten steps and more, which files may hold in the order of their letters."""
    first, losses = pupil().training, {step: 3.0 - step / 10 for step in range(12)}
    first.held_out = dict(losses)
    write_state(tmp_path / "state.safetensors", first.state_dict())
    second = pupil().training
    second.load_state_dict(read_state(tmp_path / "state.safetensors"))
    assert list(second.held_out.items()) == list(losses.items())


def test_recomputing_drops_nothing_out() -> None:
    """Of a model that would while it is trained."""
    losses = []
    for _ in range(2):
        model = tiny_model("llama", torch.float32, attention_dropout=0.5)
        adapters = adapted(model, "llama")
        losses.append([r["loss"] for r in run(training_of(model, adapters, recompute=True))])
    assert losses[0] == losses[1]
    assert_close(losses[0], [record["loss"] for record in run(pupil().training)], LOGITS[torch.float32])


def test_what_gets_worse_ends_early_and_is_not_kept() -> None:
    """Held-out text of tokens that the training text teaches not to expect: the model comes back as it was."""
    judged_WT = 30 + text(seed=1).view(-1, WINDOW)[:3]
    found = pupil(held_out=judged_WT, patience=2, learning_rate=0.1)
    before = {name: value.clone() for name, value in tiny_model("llama", torch.float32).state_dict().items()}
    run(found.training)
    assert found.training.steps == 4 and found.training.best_step == 0
    assert found.training.ended == "the loss on held-out text had not fallen for 2 evaluations"
    after = found.training.finish().state_dict()
    assert all(value.equal(before[name]) for name, value in after.items())


def test_a_model_that_predicts_as_its_teacher_has_nothing_to_learn() -> None:
    """And with another teacher it comes nearer to that."""
    records = run(pupil(teacher=tiny_model("llama", torch.float32), distill=1.0).training)
    assert abs(records[0]["loss"]) < 1e-5 and records[0]["gradient_norm"] < 1e-3
    teacher = tiny_model("llama", torch.float32)
    adapters = adapted(teacher, "llama")
    disturb(adapters, 0.1)
    other = run(pupil(teacher=adapters.merge(), distill=1.0, tokens=60 * 4 * WINDOW).training)
    assert other[-1]["loss"] < 0.7 * other[0]["loss"]


def test_the_loss_is_shared_between_text_and_teacher() -> None:
    teacher = tiny_model("llama", torch.float32, seed=5)
    text_alone, both, teacher_alone = (
        pupil(teacher=teacher if share else None, distill=share).training.step()["loss"] for share in (0.0, 0.25, 1.0)
    )
    assert_close(both, 0.75 * text_alone + 0.25 * teacher_alone, LOGITS[torch.float32])


def test_masks_are_set_row_by_row_and_the_plan_judges() -> None:
    found = pupil(masks=sampled_masks(), rows=3)
    training, noted = found.training, found.training._masks._live  # type: ignore[union-attr]
    training.evaluate()
    training.step()
    assert [tuple(masks.shape) for masks in noted.masks] == [(1, 2), (3, 2), (1, 2)]
    assert noted.masks[0].tolist() == [[True, False]]
    assert torch.cat(noted.masks[1:]).equal(sampled_masks().draw(0, 0.0, 4))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    found = pupil()
    found.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(LossError, match=r"held-out text is nan after 0 steps; a lower recover\.learning_rate"):
        found.training.evaluate()
    with pytest.raises(LossError, match=r"step 0 is nan"):
        found.training.step()


def test_a_state_of_other_adapters_is_refused() -> None:
    other = pupil()
    state = other.training.state_dict()
    state["adapters"] = {name: value[:1] for name, value in state["adapters"].items()}
    with pytest.raises(RunError, match="written for other adapters"):
        pupil().training.load_state_dict(state)


def test_the_rate_rises_from_the_first_step_on() -> None:
    """Which is not lost on a rate of zero."""
    assert pupil(tokens=100 * 4 * WINDOW, warmup=0.1).training.learning_rate(0) == pytest.approx(0.02 / 10, rel=1e-2)


def test_held_out_windows_count_alike_however_they_are_run() -> None:
    """Three of them, two in a pass."""
    judged_WT = text(seed=1).view(-1, WINDOW)[:3]
    few, many = (pupil(held_out=judged_WT, rows=rows).training.evaluate() for rows in (2, 4))
    assert few == pytest.approx(many, rel=1e-6)


def test_the_usual_training_is_judged_twenty_times() -> None:
    assert pupil(tokens=100 * 4 * WINDOW, evaluate_steps=None).training._every == 5
