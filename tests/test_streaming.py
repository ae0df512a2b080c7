"""A model that is run layer by layer does what it does as a whole, and sees what happens to its layers on the way."""

from functools import partial

import pytest
import torch
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from whole_passes import input_statistics, watching

from bernprune.backends import load_backend
from bernprune.models.masking import masked
from bernprune.models.streaming import LayerStream
from bernprune.models.view import describe

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_layer_sees_what_it_sees_in_a_whole_pass(variant: Variant) -> None:
    view, windows_WT = describe(variant.model()), random_tokens(5, 12)
    whole = input_statistics(view, windows_WT)
    stream = LayerStream(view, windows_WT, rows_per_forward=2)  # the last pass has one row
    for index, layer in enumerate(view.layers):
        assert stream.index == index and stream.layer is layer
        with watching([layer]) as gathered:
            stream.run()
        stream.advance()
        for point, statistics in gathered[0].items():
            assert statistics.count == whole[index][point].count == 60
            torch.testing.assert_close(statistics.second_moment_E, whole[index][point].second_moment_E)


def test_layers_see_what_was_done_to_those_before_them() -> None:
    view, windows_WT = describe(tiny_model("llama")), random_tokens(3, 12)
    mask_U = torch.ones(view.space.size, dtype=torch.bool)
    mask_U[view.space.span("channel", 0)] = False
    ops = load_backend("torch", CPU)
    with masked(view, ops, layers=[0]) as live:
        live.set(mask_U[None])
        whole = input_statistics(view, windows_WT)
    stream = LayerStream(view, windows_WT, rows_per_forward=2)
    with masked(view, ops, layers=[0]) as live:
        live.set(mask_U[None])
        stream.advance()
    with watching([stream.layer]) as gathered:
        stream.run()
    torch.testing.assert_close(gathered[0]["down"].mean_E, whole[1]["down"].mean_E)


def test_the_model_is_left_as_it_was() -> None:
    """With a forward that was set on a layer, as hooks are, and none where there was none; also if a pass fails."""
    model = tiny_model("qwen3")
    view, tokens_BT = describe(model), random_tokens(2, 12)
    hooked = view.layers[1].layer
    before, hooked.forward = model(tokens_BT).logits, partial(hooked.forward)
    own = hooked.forward
    LayerStream(view, tokens_BT, rows_per_forward=2).advance()
    with pytest.raises(IndexError):
        LayerStream(view, tokens_BT + 10**6, rows_per_forward=2)
    assert torch.equal(model(tokens_BT).logits, before)
    assert [vars(layer.layer).get("forward") for layer in view.layers] == [None, own, None, None]
