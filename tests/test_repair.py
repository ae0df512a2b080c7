"""Repair does what its formulas say, what is repaired is what is sliced, and what fails leaves nothing behind."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import VARIANTS, Variant, random_plan, random_tokens, tiny_model
from tiny_run import verify_here
from tolerances import EXACT, LOGITS, assert_close

from bernprune.errors import ConfigError, DataError, ModelError
from bernprune.models.architecture import architecture_of
from bernprune.models.hooks import hooked
from bernprune.models.saving import save_pruned
from bernprune.models.slicing import slice_model
from bernprune.models.statistics import Gram, weights_by_stream
from bernprune.models.view import ModelView, describe
from bernprune.names import RepairName
from bernprune.objective import masked_objective
from bernprune.repair import Repairer, clearly_better, fitting, weights
from bernprune.repair.closed import Linear, compensated, reconstructed, reformed, rescaled
from bernprune.repair.moments import Moments
from bernprune.repair.needs import check_biases, needed_windows
from bernprune.repair.pairs import Pair
from bernprune.repair.places import places
from bernprune.repair.weights import Weights, put
from bernprune.units import KeepPlan, LayerPlan

METHODS = ("bias", "ridge", "two-step", "scale", "admm")
REMOVED: dict[str, Any] = {"without_ffn": (1,), "without_attention": (2,), "dropped": (3,)}
CPU = torch.device("cpu")
BIASES = pytest.mark.parametrize("biased", [False, True])


# The closed forms against slow twins on explicit matrices


def sample(inputs: int = 6, outputs: int = 5, tokens: int = 40) -> tuple[Moments, np.ndarray, np.ndarray, Linear]:
    """Moments of tokens that are given too, inputs x and targets t, and what a projection did before."""
    random = np.random.default_rng(0)
    x, t = random.normal(size=(tokens, inputs)) + 1, random.normal(size=(tokens, outputs))
    t += x @ random.normal(size=(inputs, outputs))
    moments = Moments(inputs, outputs, CPU)
    for rows in np.split(np.arange(tokens), 4):
        moments.add(torch.tensor(x[rows]), torch.tensor(t[rows]))
    dense = Linear(torch.tensor(random.normal(size=(outputs, inputs))), torch.tensor(random.normal(size=outputs)))
    return moments, x, t, dense


def numbers(dense: Linear) -> tuple[np.ndarray, np.ndarray]:
    assert dense.bias_D is not None
    return dense.weight_DA.numpy(), dense.bias_D.numpy()


def centred(x: np.ndarray, t: np.ndarray, bias: np.ndarray, biased: bool) -> tuple[np.ndarray, np.ndarray]:
    return (x - x.mean(0), t - t.mean(0)) if biased else (x, t - bias)


def assert_fits(
    found: Linear, weight: np.ndarray, x: np.ndarray, t: np.ndarray, bias: np.ndarray, biased: bool
) -> None:
    expected = (t - x @ weight.T).mean(0) if biased else bias
    assert found.bias_D is not None
    assert_close(found.weight_DA, torch.tensor(weight), 1e3 * EXACT)
    assert_close(found.bias_D, torch.tensor(expected), 1e3 * EXACT)


def test_the_error_is_that_of_explicit_matrices() -> None:
    moments, x, t, dense = sample()
    weight, bias = numbers(dense)
    assert moments.error(dense.weight_DA, dense.bias_D) == pytest.approx(
        np.square(t - x @ weight.T - bias).sum(1).mean(), rel=1e-10
    )
    assert moments.error(dense.weight_DA, None) == pytest.approx(np.square(t - x @ weight.T).sum(1).mean(), rel=1e-10)


def test_merged_moments_are_those_of_all_tokens() -> None:
    whole, x, t, _ = sample()
    first, second = Moments(6, 5, CPU), Moments(6, 5, CPU)
    first.add(torch.tensor(x[:7]), torch.tensor(t[:7]))
    second.add(torch.tensor(x[7:]), torch.tensor(t[7:]))
    first.merge(second)
    for found, expected in zip(first.about(*first.means), whole.about(*whole.means), strict=True):
        assert_close(found, expected, 1e2 * EXACT)


def test_tokens_count_as_often_as_their_weights_say() -> None:
    """As if those of a whole weight were there so often."""
    whole, x, t, dense = sample()
    weights, weighed, repeated = torch.arange(40) % 4, Moments(6, 5, CPU), Moments(6, 5, CPU)
    weighed.add(torch.tensor(x), torch.tensor(t), weights)
    repeated.add(*(torch.tensor(values).repeat_interleave(weights, dim=0) for values in (x, t)))
    assert weighed.count == repeated.count == 60
    for found, expected, plain in zip(*(each.about(*each.means) for each in (weighed, repeated, whole)), strict=True):
        assert_close(found, expected, 1e2 * EXACT)
        assert not torch.allclose(found, plain)
    linear = dense.weight_DA, dense.bias_D
    assert weighed.error(*linear) == pytest.approx(repeated.error(*linear), rel=1e-10)


def test_moments_of_some_outputs_are_those_of_a_projection_that_has_no_others() -> None:
    whole, x, t, dense = sample()
    chosen_S, alone = torch.tensor([1, 2, 4]), Moments(6, 3, CPU)
    alone.add(torch.tensor(x), torch.tensor(t)[:, chosen_S])
    part = whole.of_outputs(chosen_S)
    for found, expected in zip(part.about(*part.means), alone.about(*alone.means), strict=True):
        assert_close(found, expected, 1e2 * EXACT)
    few = Linear(dense.weight_DA[chosen_S], None)
    assert part.error(*vars(few).values()) == pytest.approx(alone.error(*vars(few).values()), rel=1e-10)


def test_a_compensated_bias_has_the_right_mean() -> None:
    moments, x, t, dense = sample()
    found = compensated(moments, dense)
    assert found.weight_DA is dense.weight_DA and found.bias_D is not None
    assert_close(found.bias_D, torch.tensor(t.mean(0) - numbers(dense)[0] @ x.mean(0)), 1e2 * EXACT)


@BIASES
@pytest.mark.parametrize("ridge", [1e-4, 0.3, 100.0])
def test_ridge_is_least_squares_with_rows_that_hold_back(ridge: float, biased: bool) -> None:
    """As many further rows as inputs, in each of which one input is large and wants to give what it gave."""
    moments, x, t, dense = sample()
    weight, bias = numbers(dense)
    x0, t0 = centred(x, t, bias, biased)
    strength = np.sqrt(len(x) * ridge * np.square(x0).mean()) * np.eye(6)
    solved = np.linalg.lstsq(np.vstack([x0, strength]), np.vstack([t0, strength @ weight.T]), rcond=None)[0].T
    assert_fits(reconstructed(moments, dense, ridge, biased=biased), solved, x, t, bias, biased)


@BIASES
@pytest.mark.parametrize("units", [6, 3, 1])
def test_scales_are_least_squares_over_one_number_a_unit(units: int, biased: bool) -> None:
    moments, x, t, dense = sample()
    (weight, bias), ridge = numbers(dense), 0.1
    x0, t0 = centred(x, t, bias, biased)
    columns = [
        (x0[:, part] @ weight[:, part].T).ravel() for part in np.split(np.arange(6), units)
    ]  # what each unit gives, all outputs of all tokens in turn
    design = np.stack(columns, axis=1)
    strength = np.sqrt(ridge * np.square(design).sum(0).mean()) * np.eye(units)
    solved = np.linalg.lstsq(
        np.vstack([design, strength]), np.concatenate([t0.ravel(), strength @ np.ones(units)]), rcond=None
    )[0]
    scaled = weight * np.repeat(solved, 6 // units)
    assert_fits(rescaled(moments, dense, ridge, units=units, biased=biased), scaled, x, t, bias, biased)


@BIASES
def test_admm_is_the_published_loop(biased: bool) -> None:
    moments, x, t, dense = sample()
    weight, bias = numbers(dense)
    x0, t0 = centred(x, t, bias, biased)
    kept = np.array([True, False, True, True, False, True])
    scale = np.sqrt(np.square(x0).mean(0))
    x1, w0 = x0 / scale, weight.T * scale[:, None]
    gram, cross = x1.T @ x1 / len(x1), x1.T @ t0 / len(x1)
    damping = 0.1 * np.trace(gram) / 6
    z, u = w0 * kept[:, None], np.zeros_like(w0)
    for _ in range(20):
        w = np.linalg.solve(gram + (damping + 10) * np.eye(6), cross + damping * w0 + 10 * (z - u))
        z = (w + u) * kept[:, None]
        u += w - z
    found = reformed(moments, dense, torch.tensor(kept), biased=biased)
    assert not found.weight_DA[:, ~torch.tensor(kept)].any()
    assert_fits(found, (z / scale[:, None]).T, x, t, bias, biased)


def test_without_a_bias_none_appears() -> None:
    moments, _, _, dense = sample()
    bare = Linear(dense.weight_DA, None)
    for found in (
        reconstructed(moments, bare, 0.1, biased=False),
        rescaled(moments, bare, 0.1, units=3, biased=False),
        reformed(moments, bare, torch.ones(6, dtype=torch.bool), biased=False),
    ):
        assert found.bias_D is None


def test_a_matrix_that_rounding_left_singular_is_solved() -> None:
    """Inputs that are always equal, and the least that makes their matrix indefinite."""
    moments, x = Moments(2, 1, CPU), torch.ones(30, 1, dtype=torch.float64).cumsum(0)
    moments.add(x.expand(30, 2), 3 * x)
    moments._xx_AA[1, 1] *= 1 - 1e-13
    assert torch.linalg.cholesky_ex(moments._xx_AA).info > 0
    found = reconstructed(moments, Linear(torch.ones(1, 2, dtype=torch.float64), None), 1e-18, biased=False)
    assert found.weight_DA.sum().item() == pytest.approx(3)


@pytest.mark.parametrize("dead", ["inputs", "weights"])
def test_what_does_nothing_is_left_as_it_was(dead: str) -> None:
    """Inputs that are always zero, or weights of zero: no weight is better than another."""
    random = torch.Generator().manual_seed(3)
    x, weight_DA = (torch.randn(rows, 6, generator=random, dtype=torch.float64) for rows in (10, 2))
    (x if dead == "inputs" else weight_DA).zero_()
    moments = Moments(6, 2, CPU)
    moments.add(x, torch.ones(10, 2))
    bare = Linear(weight_DA, None)
    assert rescaled(moments, bare, 0.1, units=3, biased=False).weight_DA.equal(weight_DA)
    if dead == "inputs":
        assert reconstructed(moments, bare, 0.1, biased=False).weight_DA.equal(weight_DA)


def test_a_singular_matrix_is_refused() -> None:
    """One of which a number is missing."""
    moments, x = Moments(3, 2, CPU), torch.ones(10, 3)
    x[4, 1] = math.nan
    moments.add(x, torch.ones(10, 2))
    with pytest.raises(ModelError, match=r"Gram matrix of 3 inputs is singular.*not finite"):
        reconstructed(moments, Linear(torch.ones(2, 3, dtype=torch.float64), None), 0.1, biased=False)


# The pass over the layers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "resid"}, "repair target 'resid' is unknown; .*; did you mean 'residual'"),
        ({"ridges": ()}, r"one or more numbers above 0, but are \[\]"),
        ({"ridges": (0.1, -1.0)}, r"above 0, but are \[0.1, -1.0\]"),
        ({"ridges": (math.inf,)}, r"above 0, but are \[inf\]"),
    ],
    ids=str,
)
def test_repairers_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    view, plan = view_of(VARIANTS[0], **REMOVED)
    with pytest.raises(ConfigError, match=said):
        repairer(view, **given).repair(plan, "ridge")


@pytest.mark.parametrize(
    ("failing", "method", "said"),
    [
        (1, "ridge", "^the attention output projection of layer 0 cannot be fitted: the Gram"),
        (2, "ridge", "^the down projection of layer 0 cannot"),
        (1, "two-step", "^what enters the attention of layer 0 cannot"),
    ],
)
def test_what_cannot_be_solved_is_named(failing: int, method: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matrix is singular; the model is as before."""
    view, plan = view_of(VARIANTS[0], **REMOVED)
    before, calls = state_of(view), iter(range(1000))

    def solving(*given: Any, **named: Any) -> Linear:
        if next(calls) // 2 + 1 == failing:  # two ridges each
            raise ModelError("the Gram matrix is singular")
        return reconstructed(*given, **named)

    monkeypatch.setattr(fitting, "reconstructed", solving)
    with pytest.raises(ModelError, match=said):
        repairer(view).repair(plan, method)
    assert_same(view, before)


def view_of(variant: Variant, **removed: Any) -> tuple[ModelView, KeepPlan]:
    view = describe(variant.model(), ("layer", "attention", "kv_group", "ffn", "channel"))
    plan = random_plan(architecture_of(view.model), 5, **removed)
    some = LayerPlan((0, 2) if view.layers[0].shape.kv_groups > 2 else (0,), (0, 2, 3, 5, 8, 13, 14))
    return view, KeepPlan(plan.architecture, (some, *plan.layers[1:]))


@pytest.mark.parametrize("constant", [0.1, 1e-3, 123.4])
def test_an_input_that_is_always_the_same_is_left_as_it_was(constant: float) -> None:
    """What rounding leaves of its variance is none; the others are fitted as if it were not there."""
    random = torch.Generator().manual_seed(3)
    x, weight_DA = torch.randn(999, 4, generator=random), torch.randn(2, 4, generator=random).double()
    x[:, 1] = constant
    target = x @ torch.randn(4, 2, generator=random)
    others = [0, 2, 3]
    found = []
    for kept in ([0, 1, 2, 3], others):
        moments = Moments(len(kept), 2, CPU)
        for rows in range(0, 999, 333):
            moments.add(x[rows : rows + 333, kept], target[rows : rows + 333])
        found.append(reconstructed(moments, Linear(weight_DA[:, kept], None), 1e-9, biased=True).weight_DA)
    assert found[0][:, 1].equal(weight_DA[:, 1])
    assert_close(found[0][:, others], found[1], 1e-6)


@pytest.mark.parametrize("method", ["ridge", "two-step", "scale"])
def test_a_block_that_gives_the_same_for_all_tokens_is_repaired(method: RepairName) -> None:
    """Its biases alone pass through it."""
    model = tiny_model("llama", torch.float32, attention_bias=True, mlp_bias=True)
    for projection in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        projection.weight.data.zero_()
        projection.bias.data.fill_(0.3)
    view = describe(model)
    plan = random_plan(view.architecture, 5)
    repairer(view).repair(plan, method)
    assert math.isfinite(plain_loss(slice_model(model, plan)))


def repairer(view: ModelView, **settings: Any) -> Repairer:
    return Repairer(view, random_tokens(20, 12), **{"rows_per_forward": 10, "ridges": (1e-3, 0.1)} | settings)


def loss_of(view: ModelView, plan: KeepPlan) -> float:
    with masked_objective(view) as objective:
        return objective.losses(view.space.mask(plan)[None], random_tokens(6, 12, seed=1)).item()


def plain_loss(model: Any) -> float:
    tokens = random_tokens(6, 12, seed=1)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def state_of(view: ModelView) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in view.model.named_parameters()}


def assert_same(view: ModelView, before: dict[str, torch.Tensor]) -> None:
    after = state_of(view)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_repaired_is_what_is_sliced(variant: Variant) -> None:
    """Under the mask, without it, and cut: one loss. Another one than before, whatever the family and its biases."""
    view, plan = view_of(variant, **REMOVED)
    dense = loss_of(view, plan)
    repairer(view, biases="grouped" in variant.name).repair(plan, "two-step")
    masked, unmasked = loss_of(view, plan), plain_loss(view.model)
    sliced = slice_model(view.model, plan)
    assert masked == pytest.approx(unmasked, rel=1e-10) and masked == pytest.approx(plain_loss(sliced), rel=1e-10)
    assert abs(masked - dense) > 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama-grouped", "llama-biases", "qwen2-sliding"])
def test_every_method_ends_in_one_loss(name: str, method: Any) -> None:
    variant = {variant.name: variant for variant in VARIANTS}[name]
    view, plan = view_of(variant, **REMOVED)
    done = repairer(view, biases=True).repair(plan, method)
    assert done.method == method and len(done.layers) == 4
    masked = loss_of(view, plan)
    assert done.layers[1]["ffn"] is None and done.layers[2]["attention"] is None
    branches = [branch for layer in done.layers for branch in layer.values() if branch]
    changed = [branch for branch in branches if branch["repair"] != "none"]
    assert changed and all((branch["after"] < branch["before"]) == (branch in changed) for branch in branches)
    assert masked == pytest.approx(plain_loss(slice_model(view.model, plan)), rel=1e-10)


def test_better_is_by_more_than_a_standard_error_of_the_mean() -> None:
    """Of differences on the same windows: that losses of different windows differ does not matter."""
    noise_W = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)  # the mean is known to 0.1005
    others_W = 3 + 100 * torch.arange(100, dtype=torch.float64)
    for gain, better in [(0.11, True), (0.09, False), (0.0, False), (-0.11, False)]:
        assert clearly_better(others_W - gain - noise_W, others_W) is better
    broken_W = others_W.where(noise_W > 0, torch.nan)
    assert clearly_better(others_W, broken_W) and not clearly_better(broken_W, others_W)
    assert not clearly_better(broken_W, broken_W)


def with_copies(model: Any) -> KeepPlan:
    """Make the second kv group and the odd channels of every layer linear in the others; a plan that removes them."""
    attention = architecture_of(model)
    for layer in model.model.layers:
        head = attention.head_dim
        for projection, group in (
            (layer.self_attn.k_proj, 1),
            (layer.self_attn.v_proj, 1),
            (layer.self_attn.q_proj, 2),
        ):
            rows = projection.weight.data
            rows[group * head : 2 * group * head] = rows[: group * head]
        layer.self_attn.v_proj.weight.data[head : 2 * head] *= -0.5
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data[1::2] = projection.weight.data[:-1:2]
        layer.mlp.up_proj.weight.data[1::2] *= 3
    channels = tuple(range(0, 19, 2))
    return KeepPlan(attention, (LayerPlan((0, 2), channels),) * 4)


@pytest.mark.parametrize("target", ["own", "dense", "residual"])
@BIASES
def test_what_depends_on_what_is_kept_is_restored(target: Any, biased: bool) -> None:
    """Removed inputs that are linear in the kept ones: the repaired model is the dense one, whatever is aimed at."""
    view = describe(tiny_model("llama"))
    plan, tokens = with_copies(view.model), random_tokens(4, 12, seed=2)
    with torch.no_grad():
        dense = view.model(input_ids=tokens).logits
        windows = random_tokens(60, 12)
        Repairer(view, windows, target=target, ridges=(1e-13,), biases=biased).repair(plan, "ridge")
        assert_close(slice_model(view.model, plan)(input_ids=tokens).logits, dense, 1e-6)


def test_the_bias_is_what_the_removed_inputs_gave_on_average() -> None:
    """FLAP's, in the first layer, where the inputs are those of the dense model."""
    view, plan = view_of(Variant("llama", "llama"))
    windows, seen = random_tokens(20, 12), dict[str, torch.Tensor]()
    layer, weight = view.layers[0], view.layers[0].down.weight.detach().clone()
    with torch.no_grad():
        handle = layer.output.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0].flatten(0, 1)))
        view.model(input_ids=windows)
        handle.remove()
    removed = torch.ones(layer.output.in_features, dtype=torch.bool)
    removed[places(view, plan, 0)[0].kept_A] = False
    expected = layer.output.weight.detach()[:, removed] @ seen["x"][:, removed].mean(0)
    Repairer(view, windows, biases=True).repair(plan, "bias")
    assert_close(layer.output.bias, expected, 1e-10)
    kept = torch.tensor(plan.layers[0].channels)
    assert torch.equal(layer.down.weight[:, kept], weight[:, kept])


@pytest.mark.parametrize("method", ["bias", "scale"])
def test_what_has_few_numbers_goes_by_its_own_outputs(method: Any) -> None:
    found = []
    for target in ("own", "residual"):
        view, plan = view_of(Variant("llama", "llama"))
        repairer(view, target=target, biases=True).repair(plan, method)
        found.append(state_of(view))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_two_steps_refit_what_goes_in_by_least_squares() -> None:
    """Of the second layer's kept query, key and value rows, against explicit matrices."""
    view, plan = view_of(Variant("qwen2", "qwen2"))
    windows, other = random_tokens(12, 12), describe(tiny_model("qwen2"))

    def normed(of: ModelView, norm: Any) -> torch.Tensor:
        found = []
        handle = norm(of).register_forward_hook(lambda *hook: found.append(hook[2].flatten(0, 1)))
        with torch.no_grad():
            of.model(input_ids=windows)
        handle.remove()
        return found[0]

    def second(of: ModelView) -> Any:
        return of.layers[1].layer.input_layernorm

    dense_x = normed(other, second)
    Repairer(view, windows, ridges=(1e-3,)).repair(plan, "two-step")
    x = normed(view, second)  # the first layer has been repaired for good by then
    for name in ("q_proj", "k_proj", "v_proj"):
        before, after = (getattr(of.layers[1].attention, name) for of in (other, view))
        rows = dict(zip(("q_proj", "k_proj", "v_proj"), places(view, plan, 1)[0].first, strict=True))[name][1]
        x0, t0 = x - x.mean(0), (dense_x - dense_x.mean(0)) @ before.weight.detach().T
        strength = (len(x) * 1e-3 * x0.square().mean()).sqrt() * torch.eye(36, dtype=torch.float64)
        rows_x, rows_t = torch.cat([x0, strength]), torch.cat([t0, strength @ before.weight.detach().T])
        expected = torch.linalg.lstsq(rows_x, rows_t).solution.T
        assert_close(after.weight[rows], expected[rows], 1e-7)
        untouched = torch.ones(len(before.weight), dtype=torch.bool)
        untouched[rows] = False
        assert torch.equal(after.weight[untouched], before.weight[untouched])


@pytest.mark.parametrize("branch", [0, 1], ids=["attention", "ffn"])
def test_errors_of_the_stream_count_as_shares_of_it(branch: int) -> None:
    """Of the dense one, before and after the branch, and of the pruned one after it; where a projection is fitted to
    its own outputs, all count alike."""
    view, plan = view_of(Variant("llama", "llama"))
    windows_WT, layer = random_tokens(5, 12), view.layers[1].layer

    def streams() -> list[torch.Tensor]:
        found = list[torch.Tensor]()

        def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
            found.append(inputs[0] if module is not layer else output)

        hooks = ((module, note) for module in (layer.input_layernorm, layer.post_attention_layernorm, layer))
        with torch.no_grad(), hooked(*hooks):
            view.model(input_ids=windows_WT, use_cache=False)
        return found

    dense, pair = streams(), Pair(view, windows_WT, rows_per_forward=2)
    pair.enter(places(view, plan, 0))
    view.layers[0].down.weight.data.mul_(30)  # so that what arrives is massive where it was not
    pair.leave()
    pruned, branches = streams(), places(view, plan, 1)
    pair.enter(branches)
    place = branches[branch]
    found = {target: pair.last(place, place.kept_A, target).count for target in ("residual", "dense", "own")}
    expected = weights_by_stream(*dense[branch : branch + 2], pruned[branch + 1]).sum().item()
    assert expected < 0.1 * weights_by_stream(*dense[branch : branch + 2]).sum().item()
    assert found == pytest.approx({"residual": expected, "dense": 60, "own": 60}, rel=1e-5)


def test_a_single_unit_a_branch_is_enough() -> None:
    view = describe(tiny_model("llama"))
    plan = KeepPlan(view.architecture, (LayerPlan((1,), (7,)),) * 4)
    before = loss_of(view, plan)
    repairer(view).repair(plan, "two-step")
    masked = loss_of(view, plan)
    assert masked != before and masked == pytest.approx(plain_loss(slice_model(view.model, plan)), rel=1e-10)


def test_a_weaker_repair_is_kept_where_the_stronger_does_not_generalise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out text on which the target is what the projection gives already, and then one that it is off by a bias."""
    view, plan = view_of(Variant("llama", "llama"))
    random = torch.Generator().manual_seed(0)
    place = places(view, plan, 0)[1]
    dense, kept = place.last.weight.detach().clone(), place.kept_A

    def fitted(offset: float) -> tuple[fitting.Choice, torch.Tensor]:
        def moments(noise: float) -> Moments:
            x = torch.randn(200, len(kept), generator=random, dtype=torch.float64)
            found = Moments(len(kept), 36, CPU)
            wrong = noise * torch.randn(len(kept), 36, generator=random, dtype=torch.float64)
            found.add(x, x @ (dense[:, kept].T + wrong) + offset)
            return found

        given = iter([moments(1.0), moments(0.0)])
        monkeypatch.setattr(Pair, "last", lambda *_: next(given))
        pair = Pair(view, random_tokens(2, 12), rows_per_forward=2)
        choice = fitting.Fitter(pair, pair, "ridge", "residual", (1e-3, 1e-2), True).last(place)
        weight = place.last.weight.detach().clone()
        place.last.weight.data.copy_(dense)
        return choice, weight

    choice, weight = fitted(0.0)
    assert (choice.repair, choice.ridge, choice.before, choice.after) == ("none", None, choice.after, choice.before)
    assert torch.equal(weight[:, kept], dense[:, kept])
    assert fitted(5.0)[0].repair == "bias"


def test_the_ridge_is_the_best_on_what_was_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little text a strong one, with much a weak one."""
    chosen = []
    for count in (10, 200):
        view, plan = view_of(Variant("llama", "llama"))
        done = Repairer(view, random_tokens(count, 12), ridges=(1e-6, 1e3)).repair(plan, "ridge")
        chosen.append(done.layers[0]["ffn"]["ridge"])
    assert chosen == [1e3, 1e-6]


@pytest.mark.parametrize("method", ["bias", "ridge", "scale", "admm"])
def test_a_part_of_many_outputs_decides_for_all(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are fitted by the ridge that it prefers; a scale belongs to all outputs, which decide together."""
    changed, errors = [], []
    for deciding in (fitting.DECIDING, 30, 7):
        monkeypatch.setattr(fitting, "DECIDING", deciding)
        view, plan = view_of(Variant("llama", "llama"), **REMOVED)
        done = Repairer(view, random_tokens(200, 12), ridges=(1e-3, 1e3), biases=True).repair(plan, method)
        changed.append(state_of(view))
        errors.append([layer[branch]["after"] for layer in done.layers for branch in layer if layer[branch]])
    for other, after in zip(changed[1:], errors[1:], strict=True):
        assert all(torch.equal(changed[0][name], weight) for name, weight in other.items())
        assert (after == errors[0]) == (method == "scale")
        assert after == pytest.approx(errors[0], rel=0.6), "an estimate of the sum"


# What may go wrong


@pytest.mark.parametrize("method", METHODS)
def test_undoing_gives_every_bit_back(method: Any) -> None:
    view, plan = view_of(Variant("llama", "llama"), **REMOVED)
    before = state_of(view)
    done = repairer(view, biases=True).repair(plan, method)
    assert state_of(view).keys() != before.keys()
    done.undo()
    assert_same(view, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_whatever_interrupts_leaves_nothing_changed(
    error: type[BaseException], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, plan = view_of(Variant("llama", "llama"))
    before, left, leave = state_of(view), [after], fitting.Fitter.last

    def last(fitter: Any, place: Any) -> Any:
        done = leave(fitter, place)
        left[0] -= 1
        if left[0] < 0:
            raise error
        return done

    monkeypatch.setattr(fitting.Fitter, "last", last)
    with pytest.raises(error):
        repairer(view, biases=True).repair(plan, "two-step")
    assert_same(view, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in view.model.modules())


@pytest.mark.parametrize(
    ("method", "windows", "needed"), [("ridge", 3, 4), ("two-step", 6, 7), ("admm", 9, 10), ("scale", 3, 4)]
)
def test_too_little_text_says_how_much_is_needed(method: Any, windows: int, needed: int) -> None:
    view = describe(tiny_model("llama"))
    plan = KeepPlan(view.architecture, (LayerPlan((1,), tuple(range(14 if method != "ridge" else 7))),) * 4)
    before = state_of(view)
    with pytest.raises(DataError, match=rf"{windows} windows of 12 tokens, but {needed} \({needed * 12} tokens\)"):
        Repairer(view, random_tokens(windows, 12)).repair(plan, method)
    assert_same(view, before)
    Repairer(view, random_tokens(needed, 12)).repair(plan, method)


def test_the_windows_that_are_needed_are_enough() -> None:
    for inputs in range(1, 60):
        count = needed_windows(inputs, 12)
        assert (count - max(1, count // 4)) * 12 >= 2 * inputs
        assert count == 2 or (count - 1 - max(1, (count - 1) // 4)) * 12 < 2 * inputs


@pytest.mark.parametrize(("target", "index"), [("gate_proj", 2), ("v_proj", 1)])
def test_activations_that_are_not_finite_name_their_layer(target: str, index: int) -> None:
    view, plan = view_of(Variant("llama", "llama"))
    layer = view.layers[index].layer
    projection = getattr(layer.mlp if target == "gate_proj" else layer.self_attn, target)
    projection.weight.data.fill_(float("inf"))
    before = state_of(view)
    name = "down projection of layer 2" if target == "gate_proj" else "attention output projection of layer 1"
    with pytest.raises(ModelError, match=f"{name} are not finite"):
        repairer(view).repair(plan, "ridge")
    assert_same(view, before)


def test_quantised_layers_are_refused() -> None:
    view, plan = view_of(Variant("llama", "llama"))
    down = view.layers[2].down
    down.weight = torch.nn.Parameter(down.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"ffn of layer 2 is a Linear in torch\.float8_e4m3fn.*before quantising"):
        repairer(view).repair(plan, "ridge")


def test_a_plan_of_another_model_is_refused() -> None:
    view = describe(tiny_model("llama"))
    plan = random_plan(architecture_of(tiny_model("llama", intermediate_size=20)))
    with pytest.raises(ModelError, match="made for another model"):
        repairer(view).repair(plan, "ridge")


def test_a_bias_needs_a_place() -> None:
    view, plan = view_of(Variant("llama", "llama"))
    with pytest.raises(ConfigError, match=r"needs biases.*llama model has not.*repair\.biases"):
        repairer(view).repair(plan, "bias")
    view, plan = view_of(Variant("llama", "llama", {"attention_bias": True, "mlp_bias": True}))
    names = state_of(view).keys()
    repairer(view).repair(plan, "bias")
    assert state_of(view).keys() == names


@pytest.mark.parametrize("method", ["none", "auto", "glue"])
def test_what_is_no_method_is_refused(method: Any) -> None:
    view, plan = view_of(Variant("llama", "llama"))
    with pytest.raises(ConfigError, match=repr(method)):
        repairer(view).repair(plan, method)


# The best of several


def test_a_method_that_a_gpu_has_no_room_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """``two-step`` takes more than ``ridge``, which is not lost with it; the model is what it was in between."""
    view, plan = view_of(Variant("llama", "llama"))
    first = fitting.Fitter.first

    def full(*given: Any) -> Any:
        first(*given)
        raise torch.OutOfMemoryError("the memory is full")

    monkeypatch.setattr(fitting.Fitter, "first", full)
    told = iter([[2.0, 2.1], [1.0, 1.1]])
    done, found = repairer(view).best(plan, ("ridge", "two-step"), lambda: torch.tensor(next(told)))
    assert done is not None and done.method == "ridge" and found.keys() == {"none", "ridge"}


def judged(losses: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch) -> tuple[ModelView, str, dict[str, float]]:
    """What is left of a model, and what was chosen, by losses that are told."""
    view, plan = view_of(Variant("llama", "llama"))
    told = iter([losses["none"], losses["ridge"], losses["two-step"]])
    done, found = repairer(view).best(plan, ("ridge", "two-step"), lambda: torch.tensor(next(told)))
    return view, "none" if done is None else done.method, found


@pytest.mark.parametrize(
    ("ridge", "two_steps", "best"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "ridge"),
        ([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], "two-step"),
        ([2.1, 3.1, 4.1], [2.2, 3.2, 4.2], "none"),
        ([0.0, 4.9, 4.0], [2.0, 3.0, 4.0], "none"),  # better by less than the error
    ],
)
def test_the_best_is_left_and_no_trace_of_the_others(
    ridge: list[float], two_steps: list[float], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"none": [2.0, 3.0, 4.0], "ridge": ridge, "two-step": two_steps}
    view, chosen, found = judged(losses, monkeypatch)
    assert chosen == best
    assert found == pytest.approx({name: sum(each) / 3 for name, each in losses.items()})
    expected, plan = view_of(Variant("llama", "llama"))
    if best != "none":
        repairer(expected).repair(plan, best)  # type: ignore[arg-type]
    assert_same(view, state_of(expected))


def test_a_method_that_cannot_be_tried_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    view, plan = view_of(Variant("llama", "llama"))
    before = state_of(view)
    done, found = Repairer(view, random_tokens(3, 12)).best(plan, ("admm",), lambda: torch.tensor([1.0, 2.0]))
    assert done is None and found == {"none": 1.5}
    assert "repair 'admm' was not tried: the calibration text is too short" in caplog.text
    assert_same(view, before)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_judge_that_fails_leaves_nothing_changed(fails_at: int) -> None:
    view, plan = view_of(Variant("llama", "llama"))
    before, calls = state_of(view), [0]

    def judge() -> torch.Tensor:
        calls[0] += 1
        if calls[0] > fails_at:
            raise KeyboardInterrupt
        return torch.tensor([3.0, 3.0]) / calls[0]

    with pytest.raises(KeyboardInterrupt):
        repairer(view).best(plan, ("ridge", "two-step"), judge)
    assert_same(view, before)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, None])
def test_weights_are_exchanged_one_projection_at_a_time(fails_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back and forth to the bit; whenever it is interrupted, the originals can be put back."""
    view, _ = view_of(Variant("llama", "llama"))
    projections = [layer.down for layer in view.layers]
    before, originals, changed, calls = state_of(view), Weights(projections), Weights(), [0]
    for projection in projections:
        put(projection, projection.weight + 1, torch.ones(36))
    after = state_of(view)

    def sometimes(*args: Any) -> None:
        calls[0] += 1
        if calls[0] - 1 == fails_at:
            raise KeyboardInterrupt
        put(*args)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "put", sometimes)
        if fails_at is None:
            originals.exchange(changed)
        else:
            with pytest.raises(KeyboardInterrupt), originals.put_back_on_error():
                originals.exchange(changed)
    assert_same(view, before)
    if fails_at is None:
        assert not originals.projections, "nothing is held twice"
        changed.exchange(originals)
        assert_same(view, after)
        assert originals.projections == tuple(projections)


# What is saved


@pytest.mark.parametrize("name", ["llama-grouped", "llama-attention_bias", "qwen2-sliding", "qwen3-sliding_biases"])
def test_added_biases_are_declared_where_the_family_has_none(name: str) -> None:
    """And with a block its bias goes."""
    variant = {variant.name: variant for variant in VARIANTS}[name]
    view = describe(variant.model())
    layers = (LayerPlan((0, 2), (1, 2)), LayerPlan((1,), ()), LayerPlan((), (0, 3)), LayerPlan((), ()))
    plan, blocks = KeepPlan(view.architecture, layers), [["attention", "mlp"], ["attention"], ["mlp"]]
    for layer in view.layers:
        for projection in (layer.output, layer.down):
            put(projection, projection.weight.detach(), torch.linspace(-1, 1, 36))
    masked, result = loss_of(view, plan), slice_model(view.model, plan)
    assert masked == pytest.approx(plain_loss(result), rel=1e-10)
    known = {"attention"} if variant.changes.get("attention_bias") else set()
    declared = [[block for block in found if block not in known] for found in blocks]
    assert result.config.bernprune["added_biases"] == declared
    last = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    assert {name for name, _ in result.named_parameters() if name.endswith(("o_proj.bias", "down_proj.bias"))} == {
        f"model.layers.{index}.{last[block]}.bias" for index, found in enumerate(blocks) for block in found
    }


def test_ridge_leaves_the_parts_of_the_model_as_they_are() -> None:
    view, plan = view_of(Variant("llama", "llama"))
    names = state_of(view).keys()
    repairer(view).repair(plan, "two-step")
    assert state_of(view).keys() == names
    assert "added_biases" not in slice_model(view.model, plan).config.bernprune


def test_added_biases_are_loaded(tmp_path: Path) -> None:
    model = tiny_model("mistral", torch.float32)
    view, tokens = describe(model), random_tokens()
    plan = random_plan(view.architecture, 5, **REMOVED)
    repairer(view, biases=True).repair(plan, "bias")
    sliced = slice_model(model, plan)
    with torch.no_grad():
        logits = sliced(input_ids=tokens).logits
    folder = save_pruned(sliced, None, tmp_path / "out", plan=plan)
    assert verify_here(folder, tokens, logits) <= LOGITS[torch.float32] * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats_are_repaired_in_long_ones(dtype: torch.dtype) -> None:
    """The weights keep their format; of what they lose in it little is lost in the outputs."""
    found = []
    for each in (torch.float64, dtype):
        view = describe(tiny_model("llama", each))
        plan = random_plan(view.architecture, 5)
        repairer(view, ridges=(0.1,)).repair(plan, "ridge")
        assert {parameter.dtype for parameter in view.model.parameters()} == {each}
        found.append(view.layers[0].down.weight.detach().double())
    assert_close(found[1], found[0], 5 * LOGITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_biases_do_not_hide_what_is_to_be_repaired(dtype: torch.dtype) -> None:
    """Those of keys are hundreds of times as large as all else in some models; what goes in is refitted beside them."""
    found = []
    for each in (torch.float64, dtype):
        model = tiny_model("qwen2")
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data.fill_(256.0)
            layer.mlp.down_proj.weight.data *= 0.1  # of which the cut takes a little
        view = describe(model.to(each))
        mask_U = torch.ones(view.space.size, dtype=torch.bool)
        mask_U[view.space.by_layer("channel")[0][:5]] = False
        plan = view.space.plan(mask_U)
        record = repairer(view).repair(plan, "two-step").layers[1]["attention"]["first"]
        found.append((record["before"], record["after"], view.layers[1].attention.v_proj.weight.detach().double()))
    assert found[0][1] < found[0][0]
    for number, expected in zip(found[1], found[0], strict=True):
        assert_close(number, expected, 50 * LOGITS[dtype])


def test_masks_and_plans_say_the_same() -> None:
    for granularity in (("kv_group", "channel"), ("layer", "attention", "kv_group", "ffn", "channel")):
        view = describe(tiny_model("llama"), granularity)  # type: ignore[arg-type]
        plan = random_plan(view.architecture, 3, without_ffn=(1,), without_attention=(2,), dropped=(3,))
        assert view.space.plan(view.space.mask(plan)) == plan


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_windows_are_divided_into_some_to_fit_on_and_one_to_check(count: int) -> None:
    view = describe(tiny_model("llama"))
    done = Repairer(view, random_tokens(count, 30)).repair(with_copies(view.model), "scale")
    assert all(math.isfinite(branch["after"]) for layer in done.layers for branch in layer.values() if branch)
    done.undo()


def test_an_error_that_is_no_number_is_never_the_least() -> None:
    moments, _, _, dense = sample()
    assert moments.error(torch.full_like(dense.weight_DA, math.nan), None) == math.inf


# Biases and number formats


def means_of_first(view: ModelView, index: int) -> dict[str, torch.Tensor]:
    """Mean outputs of a layer's q, k and v projections."""
    found: dict[str, torch.Tensor] = {}
    attention = view.layers[index].attention

    def noting(name: str) -> Any:
        return lambda module, inputs, output: found.__setitem__(name, output.flatten(0, 1).mean(0))

    with (
        torch.no_grad(),
        hooked(*((getattr(attention, name), noting(name)) for name in ("q_proj", "k_proj", "v_proj"))),
    ):
        view.model(input_ids=random_tokens(200, 12), use_cache=False)
    return found


def test_first_projections_keep_their_means() -> None:
    """Where they have biases, what is left of a projection gives on average what it gave in the dense model."""
    view, dense = describe(tiny_model("qwen2")), describe(tiny_model("qwen2"))
    plan = random_plan(view.architecture, 5)
    done = Repairer(view, random_tokens(200, 12), ridges=(1e-3,)).repair(plan, "two-step")
    assert done.layers[1]["attention"]["first"]["repair"] == "ridge"
    found, wanted = means_of_first(view, 1), means_of_first(dense, 1)
    rows = dict(zip(found, (rows for _, rows in places(view, plan, 1)[0].first), strict=True))
    for name in found:
        assert_close(found[name][rows[name]], wanted[name][rows[name]], 1e-9)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_half_of_the_biases_are_not_enough(changes: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="needs biases"):
        check_biases(describe(tiny_model("llama", **changes)))


def test_biases_of_the_model_are_fitted_too() -> None:
    """They need not be added."""
    view = describe(tiny_model("llama", attention_bias=True, mlp_bias=True))
    before = [layer.down.bias.detach().clone() for layer in view.layers]
    plan = KeepPlan(view.architecture, (LayerPlan((0, 2), tuple(range(9))),) * 4)
    Repairer(view, random_tokens(200, 12), ridges=(1e-3,)).repair(plan, "ridge")
    assert not any(layer.down.bias.equal(bias) for layer, bias in zip(view.layers, before, strict=True))


def test_moments_of_short_numbers_are_summed_in_long_ones() -> None:
    """Of bfloat16, as models are: those of the same numbers in float64."""
    x_RTE = (3 + torch.randn(7, 50, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    t_RTD = torch.randn(7, 50, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact_NE, gram = x_RTE.double().flatten(0, 1), Gram(torch.nn.Linear(6, 4, dtype=torch.bfloat16))
    gram.add(x_RTE)
    moments = Moments(6, 4, CPU)
    moments.add(x_RTE.flatten(0, 1), t_RTD.flatten(0, 1))
    about_zero = moments.about(torch.zeros(6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))[0]
    for found in (gram.mean_EE, about_zero):
        assert_close(found, exact_NE.T @ exact_NE / len(exact_NE), 1e-6)
