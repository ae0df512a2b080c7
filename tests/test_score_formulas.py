"""Published metrics against slow and obvious twins in numpy, and what must not change them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tolerances import EXACT, LOGITS, assert_close

from bernprune.models.view import ModelView, describe
from bernprune.policy.allocation import shares_by_importance
from bernprune.scores import SCORES, initial_scores
from bernprune.scores.distances import distance_of
from bernprune.scores.goa import listed_at

WINDOWS_WT = random_tokens(4, 9)
BIASED = {"attention_bias": True, "mlp_bias": True}
FLOAT32_WEIGHTS = LOGITS[torch.float32]
HEADS, GROUPS, HEAD_DIM = 6, 3, 8
all_metrics = pytest.mark.parametrize("metric", SCORES.values(), ids=SCORES)


def biased() -> Any:
    """Grouped-query attention, with a bias in every projection."""
    return tiny_model("llama", **BIASED)


def caught(model: Any, *names: str) -> dict[tuple[int, str], np.ndarray]:
    """Of modules of every layer by their names what enters and, as 'name.out', what leaves, ``[N, E]``."""
    seen: dict[tuple[int, str], list[np.ndarray]] = {}

    def hook(key: tuple[int, str], value: torch.Tensor) -> None:
        seen.setdefault(key, []).append(value.flatten(0, 1).detach().numpy())

    handles = []
    for index, layer in enumerate(model.model.layers):
        for name in names:
            module = layer.get_submodule(name.removesuffix(".out"))
            if name.endswith(".out"):
                taken = lambda _, args, out, key=(index, name): hook(key, out)  # noqa: E731
                handles.append(module.register_forward_hook(taken))
            else:
                handles.append(module.register_forward_pre_hook(lambda _, args, key=(index, name): hook(key, args[0])))
    with torch.no_grad():
        model(input_ids=WINDOWS_WT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: np.concatenate(values) for key, values in seen.items()}


def numbers(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight(model: Any, layer: int, name: str) -> np.ndarray:
    return model.model.layers[layer].get_submodule(name).weight.detach().numpy()


def found_for(view: ModelView, name: str, kind: Any, layer: int) -> torch.Tensor:
    return initial_scores(view, WINDOWS_WT, SCORES[name], rows_per_forward=3)[view.space.span(kind, layer)]


# FLAP


@pytest.mark.parametrize("name", ["flap-wifn", "flap-ifv"])
@pytest.mark.parametrize(("kind", "projection"), [("kv_group", "self_attn.o_proj"), ("channel", "mlp.down_proj")])
def test_variants_of_flap(name: str, kind: Any, projection: str) -> None:
    """WIFN and IFV by hand, squared for attention, in standard deviations from the projection's mean."""
    model = biased()
    x_NE, w_DE = caught(model, projection)[1, projection], weight(model, 1, projection)
    values = []
    for j in range(x_NE.shape[1]):
        value = (
            np.var(x_NE[:, j]) if name == "flap-ifv" else np.abs(w_DE[:, j]).mean() * np.sqrt((x_NE[:, j] ** 2).mean())
        )
        values.append(value ** (2 if kind == "kv_group" else 1))
    standard = (np.array(values) - np.mean(values)) / np.std(values, ddof=1)
    expected = standard.reshape(GROUPS, -1).mean(1) if kind == "kv_group" else standard
    assert_close(found_for(describe(model), name, kind, 1), numbers(expected), FLOAT32_WEIGHTS)


# GOA


def test_second_moments_of_goa() -> None:
    """Half the squared weights that read it, times the second moment of what made it; of gate and up a product."""
    model = biased()
    x = caught(model, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    view = describe(model)
    for layer in range(4):
        down, out = weight(model, layer, "mlp.down_proj"), weight(model, layer, "self_attn.o_proj")
        channels = []
        for j in range(19):
            moments = []
            for name in ("mlp.gate_proj", "mlp.up_proj"):
                module = model.model.layers[layer].get_submodule(name)
                row, bias = weight(model, layer, name)[j], module.bias.detach().numpy()[j]
                moments.append(
                    0.5 * (down[:, j] ** 2).sum() * np.mean([(row @ token + bias) ** 2 for token in x[layer, name]])
                )
            channels.append(moments[0] * moments[1])
        assert_close(found_for(view, "goa-moment", "channel", layer), numbers(channels), EXACT)
        assert_close(found_for(view, "goa", "channel", layer), numbers(channels), FLOAT32_WEIGHTS)  # a float32 softmax
        read = x[layer, "self_attn.o_proj"]
        columns = [0.5 * (out[:, j] ** 2).sum() * (read[:, j] ** 2).mean() for j in range(HEADS * HEAD_DIM)]
        expected = numbers(columns).view(GROUPS, -1).mean(1)
        assert_close(found_for(view, "goa-moment", "kv_group", layer), expected, EXACT)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen and Shannon's, by its definition."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += 0.5 * a * math.log(a / middle) if a > 0 else 0.0
        total += 0.5 * b * math.log(b / middle) if b > 0 else 0.0
    return total


def test_heads_of_goa_are_listed_by_how_alike_they_attend() -> None:
    """From the attention that transformers itself shows."""
    view, model = describe(tiny_model("qwen2")), tiny_model("qwen2")
    model.config._attn_implementation = "eager"
    probs = model(input_ids=WINDOWS_WT, output_attentions=True).attentions[2].detach().numpy()
    heads = np.zeros((HEADS, HEADS))
    for i in range(HEADS):
        for j in range(HEADS):
            heads[i, j] = np.mean([divergence(p[i, t], p[j, t]) for p in probs for t in range(probs.shape[2])])
    per = HEADS // GROUPS
    groups = np.zeros((GROUPS, GROUPS))
    for g in range(GROUPS):
        for h in range(GROUPS):
            mine, theirs = range(g * per, (g + 1) * per), range(h * per, (h + 1) * per)
            there = np.mean([min(heads[i, j] for j in theirs) for i in mine])
            back = np.mean([min(heads[i, j] for i in mine) for j in theirs])
            groups[g, h] = (there + back) / 2
    pairs = sorted((groups[g, h], g, h) for g in range(GROUPS) for h in range(g + 1, GROUPS))
    expected, listed = [math.log(2)] * GROUPS, list[int]()
    for distance, g, h in pairs:
        if g not in listed and h not in listed:
            expected[g] = distance
            listed.append(g)
    assert_close(found_for(view, "goa", "kv_group", 2), numbers(expected), EXACT)


def test_of_two_alike_one_is_listed() -> None:
    """By hand: 0 and 2 are twins, so 0 goes first; 1 is then nearest to 2, and is listed; 2 and 3 stand for them."""
    distance_GG = torch.tensor([[0, 0.5, 0.1, 0.6], [0.5, 0, 0.2, 0.4], [0.1, 0.2, 0, 0.3], [0.6, 0.4, 0.3, 0]])
    assert_close(listed_at(distance_GG), torch.tensor([0.1, 0.2, 0.3, math.log(2)]), 1e-6)
    assert listed_at(torch.zeros(1, 1)).tolist() == [math.log(2)]


# CFSP


@pytest.mark.parametrize("name", ["cfsp", "cfsp-released"])
def test_cfsp_within_a_block(name: str) -> None:
    """By loops; as released, the weights cancel and 3 / D times the norm of the activation is left."""
    model = biased()
    x_NF = caught(model, "mlp.down_proj")[3, "mlp.down_proj"]
    down, up, gate = (weight(model, 3, f"mlp.{part}_proj") for part in ("down", "up", "gate"))
    norm = np.sqrt((x_NF**2).sum(0) / len(WINDOWS_WT))
    matrices = [np.abs(down * norm), np.abs(up.T), np.abs(gate.T)]
    axis = 0 if name == "cfsp-released" else 1
    expected = []
    for j in range(19):
        terms = 0.0
        for matrix in matrices:
            for i in range(36):
                terms += matrix[i, j] / (matrix[:, j].sum() if axis == 0 else matrix[i].sum())
        expected.append(terms / 36 * norm[j])
    found = found_for(describe(model), name, "channel", 3)
    assert_close(found, numbers(expected), EXACT)
    released = torch.from_numpy(3 * norm / 36)
    assert torch.allclose(found, released) == (name == "cfsp-released")


@pytest.mark.parametrize("name", ["cfsp", "cfsp-released"])
def test_cfsp_of_heads(name: str) -> None:
    """By loops: a kv group's columns of the output projection, each with the value row that its query head reads."""
    model = biased()
    x_NE = caught(model, "self_attn.o_proj")[2, "self_attn.o_proj"]
    output, value = weight(model, 2, "self_attn.o_proj"), weight(model, 2, "self_attn.v_proj")
    norm = np.sqrt((x_NE**2).sum(0) / len(WINDOWS_WT))
    per = HEADS // GROUPS
    rows = [(head // per) * HEAD_DIM + d for head in range(HEADS) for d in range(HEAD_DIM)]
    matrices = [np.abs(output * norm), np.abs(np.stack([value[row] for row in rows], axis=1))]
    expected = []
    for j in range(HEADS * HEAD_DIM):
        terms = 0.0
        for matrix in matrices:
            for i in range(36):
                terms += matrix[i, j] / (matrix[:, j].sum() if name == "cfsp-released" else matrix[i].sum())
        expected.append(terms / 36 * norm[j])
    groups = [np.mean(expected[g * per * HEAD_DIM : (g + 1) * per * HEAD_DIM]) for g in range(GROUPS)]
    assert_close(found_for(describe(model), name, "kv_group", 2), numbers(groups), EXACT)


def test_shares_by_importance() -> None:
    """By hand: sigmoids of differences from the mean; and drawn together where a layer would keep all of itself."""
    importance_L = torch.tensor([0.1, 0.2, 0.6])
    t = [1 / (1 + math.exp(-13.1072 * (value - 0.3))) for value in (0.1, 0.2, 0.6)]
    expected = torch.tensor([0.3 * value / (sum(t) / 3) for value in t])
    found = shares_by_importance(importance_L, 0.3)
    assert_close(found, expected, 1e-6)
    drawn = shares_by_importance(importance_L, 0.7)
    assert drawn.mean().item() == pytest.approx(0.7)
    assert drawn.max().item() == pytest.approx(0.7 + 0.3 / 1.05)
    ratio = (drawn - 0.7) / (expected / 0.3 - 1)
    assert_close(ratio, ratio[0].expand(3), 1e-5)


# Blocks


@pytest.mark.parametrize("name", ["cosine", "angular", "mse", "mae"])
def test_distances(name: Any) -> None:
    """Of two small vectors, by hand: 3, 4 and 4, 3."""
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    expected = {"cosine": 1 - 24 / 25, "angular": math.acos(24 / 25) / math.pi, "mse": 1.0, "mae": 1.0}[name]
    assert distance_of(name)(one, other).item() == pytest.approx(expected, rel=1e-5)


def test_block_influence() -> None:
    """1 - the mean cosine over tokens, from the hidden states that transformers shows."""
    model = tiny_model("qwen3")
    layers = [f"{part}.out" for part in ("self_attn.o_proj", "mlp")]
    out = caught(model, *layers)
    hidden = model(input_ids=WINDOWS_WT, output_hidden_states=True).hidden_states
    view = describe(model, ("layer", "attention", "ffn"))
    scores_U = initial_scores(view, WINDOWS_WT, SCORES["block-influence"], rows_per_forward=3)

    def influence(before: np.ndarray, after: np.ndarray) -> float:
        cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(before, after, strict=True)]
        return 1 - float(np.mean(cosines))

    for layer in range(4):
        before = hidden[layer].detach().flatten(0, 1).numpy()
        middle = before + out[layer, "self_attn.o_proj.out"]
        after = middle + out[layer, "mlp.out"]
        expected = {"layer": (before, after), "attention": (before, middle), "ffn": (middle, after)}
        for kind, (a, b) in expected.items():
            span = view.space.span(kind, layer)  # type: ignore[arg-type]
            if span is not None:
                assert scores_U[span].item() == pytest.approx(influence(a, b), rel=1e-6)
