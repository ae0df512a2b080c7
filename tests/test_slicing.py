"""A sliced model computes what the dense model computes with the same units masked, and keeps everything else."""

import gc
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SLIDING_LAYERS, VARIANTS, Variant, random_plan, random_tokens, tiny_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from bernprune.errors import ModelError
from bernprune.models import modeling_bernprune
from bernprune.models.architecture import architecture_of
from bernprune.models.slicing import plan_hash, slice_model
from bernprune.units import Architecture, KeepPlan, LayerPlan

# One layer of each kind: whole, without FFN, without attention, gone.
REMOVED: dict[str, Any] = {"without_ffn": (1,), "without_attention": (2,), "dropped": (3,)}
REMOVALS: dict[str, dict[str, Any]] = {
    "parts": {},
    "blocks": {"without_ffn": (0, 3), "without_attention": (1, 2)},
    "each_kind": REMOVED,
    "first_layer": {"dropped": (0,), "without_attention": (2,)},
}


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


def masked_logits(model: PreTrainedModel, plan: KeepPlan, tokens: torch.Tensor) -> torch.Tensor:
    """The dense model's logits with the inputs of o_proj and down_proj masked and removed blocks switched off."""
    with ExitStack() as hooks:
        for layer, kept, shape in zip(model.model.layers, plan.layers, plan.architecture.layers, strict=True):
            groups = torch.zeros(shape.kv_groups, dtype=model.dtype)
            groups[list(kept.kv_groups)] = 1
            width = layer.self_attn.o_proj.in_features // shape.kv_groups
            channels = torch.zeros(shape.channels, dtype=model.dtype)
            channels[list(kept.channels)] = 1
            blocks = ((layer.self_attn.o_proj, groups.repeat_interleave(width)), (layer.mlp.down_proj, channels))
            for projection, mask in blocks:
                hooks.enter_context(masking(projection, mask))
        return logits_of(model, tokens)


def masking(projection: nn.Module, mask: torch.Tensor) -> ExitStack:
    hooks = ExitStack()
    hooks.callback(projection.register_forward_pre_hook(lambda _, args: (args[0] * mask,)).remove)
    if not mask.any():  # with its block, the bias of the projection goes
        hooks.callback(projection.register_forward_hook(lambda _, args, output: torch.zeros_like(output)).remove)
    return hooks


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def sliced(variant: Variant, seed: int = 3, **removed: Any) -> tuple[PreTrainedModel, KeepPlan]:
    model = variant.model()
    plan = random_plan(architecture_of(model), seed, **removed)
    return slice_model(model, plan), plan


def generated(model: PreTrainedModel, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Greedy continuation by 10 tokens, past the sliding window, never ending early."""
    return model.generate(tokens, max_new_tokens=10, do_sample=False, eos_token_id=None, **settings)


# Masking equals slicing


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("removed", REMOVALS.values(), ids=REMOVALS)
def test_sliced_equals_masked(variant: Variant, removed: dict[str, Any]) -> None:
    model, tokens = variant.model(), random_tokens()
    plan = random_plan(architecture_of(model), 1, **removed)
    dense, expected = logits_of(model, tokens), masked_logits(model, plan, tokens)
    found = logits_of(slice_model(model, plan), tokens)
    assert (found - expected).abs().max() < 1e-12
    assert (found - dense).abs().max() > 1e-3  # the plan did remove something


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_keeping_everything_changes_nothing(variant: Variant) -> None:
    model, tokens = variant.model(), random_tokens()
    architecture = architecture_of(model)
    everything = tuple(LayerPlan(tuple(range(s.kv_groups)), tuple(range(s.channels))) for s in architecture.layers)
    expected, count = logits_of(model, tokens), num_parameters(model)
    result = slice_model(model, KeepPlan(architecture, everything))
    assert torch.equal(logits_of(result, tokens), expected)
    assert num_parameters(result) == count


def test_a_uniform_plan_gives_equal_layers() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    architecture = architecture_of(model)
    layers = tuple(LayerPlan((0, 1 + i % 2), tuple(range(i, i + 9))) for i in range(4))
    plan = KeepPlan(architecture, layers)
    expected = masked_logits(model, plan, tokens)
    result = slice_model(model, plan)
    assert (logits_of(result, tokens) - expected).abs().max() < 1e-12
    assert (result.config.num_attention_heads, result.config.intermediate_size) == (4, 9)  # readable: no layer differs
    assert result.config.to_dict()["per_layer_config"] == {}


# Sizes


def expected_parameters(dense: PreTrainedModel, plan: KeepPlan) -> int:
    """By formula: what stays of each projection, its bias, and its norms, beside all that is outside the layers."""
    config, hidden, head_dim = dense.config, plan.architecture.hidden_size, plan.architecture.head_dim
    first = dense.model.layers[0]
    qkv_bias, o_bias = first.self_attn.q_proj.bias is not None, first.self_attn.o_proj.bias is not None
    mlp_bias = first.mlp.up_proj.bias is not None
    count = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden + hidden
    for kept, shape in zip(plan.layers, plan.architecture.layers, strict=True):
        if kept.kv_groups:
            keys = len(kept.kv_groups) * head_dim
            queries = keys * shape.query_heads // shape.kv_groups
            count += 2 * (queries + keys) * hidden + qkv_bias * (queries + 2 * keys) + o_bias * hidden + hidden
            count += 2 * head_dim if config.model_type == "qwen3" else 0
        if kept.channels:
            count += 3 * hidden * len(kept.channels) + mlp_bias * (2 * len(kept.channels) + hidden) + hidden
    return count


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameter_count(variant: Variant) -> None:
    model = variant.model()
    plan = random_plan(architecture_of(model), 2, **REMOVED)
    expected = expected_parameters(model, plan)
    assert num_parameters(slice_model(model, plan)) == expected


def test_dense_weights_are_freed_even_if_a_module_is_still_held() -> None:
    model = tiny_model("llama")
    held = list(model.model.layers)
    weights = [weakref.ref(layer.mlp.down_proj.weight) for layer in held]
    result = slice_model(model, random_plan(architecture_of(model), 1, **REMOVED))
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4
    with pytest.raises(AttributeError):
        model(input_ids=random_tokens())
    assert not any(tensor.is_meta for tensor in [*result.parameters(), *result.buffers()])


def test_config_states_every_layer() -> None:
    plan_layers = (LayerPlan((1,), (0, 5)), LayerPlan((), ()), LayerPlan((), (3,)), LayerPlan((0, 2), ()))
    model = tiny_model("qwen3", **SLIDING_LAYERS)
    model.config.name_or_path = "someone/base"
    plan = KeepPlan(architecture_of(model), plan_layers)
    written = slice_model(model, plan).config.to_dict()
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["intermediate_size"]) == (4, 2, 2)
    assert written["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "1": {"intermediate_size": 1, "skip": ["attention"]},
        "2": {"skip": ["mlp"]},
    }
    assert (written["num_hidden_layers"], written["head_dim"], written["model_type"]) == (3, 8, "bernprune_qwen3")
    # Layers 1 and 2 were layers 2 and 3, which slide; but one without attention takes the type before it.
    assert written["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert written["bernprune"] == {"format": 1, "plan_hash": plan_hash(plan), "base_model": "someone/base"}


# What is kept besides the weights


def test_properties_of_the_model_are_kept() -> None:
    model = tiny_model("qwen2", torch.bfloat16, tie_word_embeddings=True).train()
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 7
    model.name_or_path = "someone/base"
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    result = slice_model(model, random_plan(architecture_of(model), 1))
    frozen = {name for name, parameter in result.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}
    assert result.lm_head.weight is result.model.embed_tokens.weight
    assert result.config._attn_implementation == "eager"
    assert result.generation_config.max_new_tokens == 7
    assert (result.name_or_path, result.config.name_or_path) == ("someone/base", "")
    assert result.training
    assert result.model.layers[3].training
    assert type(result) is modeling_bernprune.BernpruneQwen2ForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementation_can_be_switched(family: str) -> None:
    model, _ = sliced(Variant(family, family), **REMOVED)
    assert model.config._attn_implementation == "sdpa"
    holding = [module for module in model.modules() if hasattr(module, "config") and not hasattr(module, "inv_freq")]
    assert len(holding) > 5 and all(module.config is model.config for module in holding)
    tokens = random_tokens()
    expected = logits_of(model, tokens)
    assert model(input_ids=tokens, output_attentions=False).attentions is None
    model.set_attn_implementation("eager")
    result = model(input_ids=tokens, output_attentions=True)
    assert len(result.attentions) == 2  # of three layers one has no attention; under sdpa there would be none
    assert (result.logits - expected).abs().max() < 1e-5  # eager takes its softmax in float32


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_under_checkpointing(family: str) -> None:
    model, _ = sliced(Variant(family, family), **REMOVED)
    tokens, gradients = random_tokens(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-9, atol=1e-12)


# Generation


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_caches_do_not_change_what_is_generated(variant: Variant) -> None:
    model, _ = sliced(variant, without_attention=(1, 3), without_ffn=(2,))
    tokens = random_tokens(2, 9)
    expected = generated(model, tokens, use_cache=False)
    assert expected.shape == (2, 19)
    assert torch.equal(generated(model, tokens), expected)
    assert torch.equal(generated(model, tokens, cache_implementation="static"), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_speculative_decoding_generates_the_same(variant: Variant) -> None:
    """Drafts that are refused are taken back from the cache, of a layer without attention too."""
    model, _ = sliced(variant, without_attention=(1, 3), without_ffn=(2,))
    repeating = random_tokens(1, 4).repeat(1, 3)
    expected = generated(model, repeating, use_cache=False)
    assert torch.equal(generated(model, repeating, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(generated(model, repeating, assistant_model=sliced(variant, **REMOVED)[0]), expected)


@pytest.mark.parametrize("layers", [(1,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_taken_back_from_a_cache_are_forgotten(family: str, layers: tuple[int, ...]) -> None:
    model, _ = sliced(Variant(family, family), without_attention=layers)
    tokens, cache = random_tokens(2, 6), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens[:, :5], past_key_values=cache)
        cache.crop(-2)
        result = model(input_ids=tokens[:, 3:], past_key_values=cache).logits
    assert (result - logits_of(model, tokens)[:, 3:]).abs().max() < 1e-6


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rows_of_a_cache_can_be_repeated_and_picked(variant: Variant) -> None:
    """As where several continuations share what they begin with."""
    model, _ = sliced(variant, without_attention=(1, 3))
    tokens, cache = random_tokens(2, 13), DynamicCache(config=model.config)
    picked = torch.tensor([3, 0, 5])
    with torch.no_grad():
        model(input_ids=tokens[:, :9], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(picked)
        rows = tokens.repeat_interleave(3, dim=0)[picked]
        result = model(input_ids=rows[:, 9:], past_key_values=cache).logits
    assert (result - logits_of(model, rows)[:, 9:]).abs().max() < 1e-6


@pytest.mark.parametrize("without_attention", [(2,), (2, 3), (1,)])
def test_sliding_layers_may_lose_their_attention(without_attention: tuple[int, ...]) -> None:
    """Layers 2 and 3 slide: the mask of a type must not be sized by an entry that holds no keys."""
    model, _ = sliced(Variant("qwen2-sliding", "qwen2", SLIDING_LAYERS), without_attention=without_attention)
    tokens, cache = random_tokens(), DynamicCache(config=model.config)
    with torch.no_grad():  # in pieces of several tokens, since the mask of a single one is often left out
        pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in tokens.split(5, dim=1)]
    assert (torch.cat(pieces, dim=1) - logits_of(model, tokens)).abs().max() < 1e-6


def test_beams_and_padding() -> None:
    model, _ = sliced(Variant("llama", "llama"), **REMOVED)
    tokens = random_tokens(2, 9)
    assert torch.equal(generated(model, tokens, num_beams=3), generated(model, tokens, num_beams=3, use_cache=False))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), tokens], dim=1)
    mask = (padded > 0).long()
    assert torch.equal(generated(model, padded, attention_mask=mask)[:, 4:], generated(model, tokens))


def test_cached_logits_agree_token_by_token() -> None:
    model, _ = sliced(Variant("mistral", "mistral"), **REMOVED)
    tokens, cache, steps = random_tokens(), DynamicCache(config=model.config), []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            result = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(result.logits)
    assert (torch.cat(steps, dim=1) - logits_of(model, tokens)).abs().max() < 1e-6


# Refusals


def plan_of(*layers: LayerPlan) -> KeepPlan:
    return KeepPlan(architecture_of(tiny_model("llama")), layers)


WHOLE, EMPTY = LayerPlan((0, 1, 2), (0, 1)), LayerPlan((), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "4 layers against 3"),
        ({"intermediate_size": 20}, "channels=19.*channels=20"),
        ({"head_dim": 10}, "head_dim 8 against 10"),
    ],
)
def test_a_plan_for_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama", **changes)
    with pytest.raises(ModelError, match=message):
        slice_model(model, plan_of(WHOLE, WHOLE, WHOLE, WHOLE))
    assert logits_of(model, random_tokens()).isfinite().all()  # untouched


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((EMPTY, EMPTY, EMPTY, EMPTY), "keeps no layer"),
        ((LayerPlan((), (0,)), WHOLE, WHOLE, WHOLE), "first kept layer without attention"),
        ((EMPTY, LayerPlan((), (0,)), WHOLE, WHOLE), "first kept layer without attention"),
    ],
)
def test_a_plan_without_a_first_attention_is_refused(layers: tuple[LayerPlan, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        slice_model(tiny_model("llama"), plan_of(*layers))


def test_a_pruned_model_is_refused() -> None:
    model, plan = sliced(Variant("llama", "llama"))
    with pytest.raises(ModelError, match="already pruned"):
        slice_model(model, plan)


def test_models_that_are_not_plain_are_refused() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.__class__ = Adapted
    with pytest.raises(ModelError, match="down projection of layer 2 is a Adapted"):
        slice_model(model, plan_of(WHOLE, WHOLE, WHOLE, WHOLE))
    model = tiny_model("llama")
    model.score = nn.Linear(36, 2)
    with pytest.raises(ModelError, match="score"):
        slice_model(model, plan_of(WHOLE, WHOLE, WHOLE, WHOLE))


def test_architecture_is_read_and_checked() -> None:
    model = tiny_model("mistral")
    found = architecture_of(model)
    assert isinstance(found, Architecture)
    assert (found.model_type, found.hidden_size, found.head_dim, len(found.layers)) == ("mistral", 36, 8, 4)
    assert (found.layers[0].query_heads, found.layers[0].kv_groups, found.layers[0].channels) == (6, 3, 19)
    model.model.layers[1].mlp.up_proj = nn.Linear(36, 18)
    with pytest.raises(ModelError, match="up projection of layer 1"):
        architecture_of(model)
    with pytest.raises(ModelError, match="causal language model"):
        architecture_of(tiny_model("llama").model)
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match="gpt2"):
        architecture_of(model)
