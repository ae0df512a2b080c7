"""The benchmark of speed times ways that give the same losses, and counts what it says.

Letters: B windows, K masks, C chunks, U units.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tolerances import CHAIN, assert_close

from benchmarks.speed import dtypes, models, providers, run, show, steps
from benchmarks.speed.providers import NAMES, provider
from bernprune.config import make_config
from bernprune.costs import Costs
from bernprune.models.view import describe

SHAPES = {"batch": (3,), "sequence": (2, 3, 1), "chunk": (2, 3, 2)}


@pytest.mark.parametrize("per", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_providers_give_the_same_losses(monkeypatch: pytest.MonkeyPatch, family: str, per: str) -> None:
    """Of each window and mask, whatever its masks hold for; the published loop knows no masks of chunks."""
    monkeypatch.setattr(providers, "measure", lambda *_: Costs())  # which takes long where kernels are interpreted
    view, tokens_BT = describe(tiny_model(family, num_hidden_layers=2).float()), random_tokens(2, 8)
    masks, found = models.masks(view, 0.5, SHAPES[per]), {}
    for name in NAMES:
        if (name, per) != ("published", "chunk"):
            with provider(name, view, rows=4, window=8) as evaluate:
                found[name] = evaluate(masks, tokens_BT)
    assert len(found) == len(NAMES) - (per == "chunk")
    for losses_BK in found.values():
        assert losses_BK.shape == (2, 3)
        assert_close(losses_BK, found["batched"], CHAIN[torch.float32])
    assert not any(module._forward_pre_hooks for module in view.model.modules())


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_steps_of_a_search_are_timed_in_parts(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """Of as many steps each, those that warm up left out; the text is read once more where the search asks for that."""
    monkeypatch.setattr(steps, "measure", lambda *_: Costs())
    config = make_config({"preset": preset, "data": {"window": 8}})
    found = steps.steps(config, describe(tiny_model("llama").float()), least=0.0, rows=64)
    assert found.keys() == {"ask", "evaluate", "tell"} | ({"look"} if preset == "default" else set())
    assert {len(times) for times in found.values()} == {1}
    assert all(time > 0 for times in found.values() for time in times)


def test_masks_keep_their_share_of_every_layer() -> None:
    """To the nearest unit, and one at least; at random, and the same in every run."""
    view = describe(tiny_model("llama"))
    for density in (0.01, 0.5, 1.0):
        masks = models.masks(view, density, (4, 2))
        for group, start in zip(view.space.groups, view.space.starts, strict=False):
            kept = masks[..., start : start + group.count].sum(-1)
            lacking = density == 1 and group.name == "layers.0.channel"
            assert (kept == max(1, round(density * group.count)) - lacking).all()
        assert masks.equal(models.masks(view, density, (4, 2)))
    assert all(len(models.masks(view, density, (8,)).unique(dim=0)) == 8 for density in (0.5, 1.0))


def test_operations_are_those_of_what_is_kept() -> None:
    """Twice the weights that a token meets: those of kept units, and the output embedding."""
    view = describe(tiny_model("llama"))
    masks = torch.zeros(2, 1, 1, view.space.size, dtype=torch.bool)
    masks[0] = True
    weights = view.space.costs_U().sum().item() / 2 + view.model.lm_head.weight.numel()
    assert run.kept_flops(view, masks, 10) == pytest.approx(2 * 10 * weights)


def test_bytes_are_those_of_what_is_kept() -> None:
    """Weights once a pass, and what goes into and comes out of each product, as hooks see it, for each token."""
    view = describe(tiny_model("llama").float())
    masks, tokens_BT = torch.ones(2, view.space.size, dtype=torch.bool), random_tokens(2, 8)
    seen: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, given, out: seen.append(given[0].numel() + out.numel()))
        for module in view.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    _, passes = run.passes_of(view, lambda: view.model(input_ids=tokens_BT).logits)
    assert passes == 1 and not view.decoder._forward_pre_hooks
    for handle in handles:
        handle.remove()
    weights = view.space.costs_U().sum().item() + view.model.lm_head.weight.numel()
    assert run.kept_bytes(view, masks, 16, 3) == 4 * (3 * weights + sum(seen))
    masks[1] = False
    without = run.kept_bytes(view, masks[1:], 16, 1)
    assert without == 4 * (view.model.lm_head.weight.numel() + 16 * (7 * 4 * 36 + 36 + 53))
    assert run.kept_bytes(view, masks, 16, 1) == pytest.approx((run.kept_bytes(view, masks[:1], 16, 1) + without) / 2)


@pytest.mark.parametrize("per", ["batch", "sequence", "chunk"])
def test_a_step_has_the_tokens_that_were_asked_for(per: str) -> None:
    """Under all of its masks."""
    shape, windows = run.shapes(per, 8192)
    sequences = shape[0] * windows if per == "batch" else shape[0] * shape[1]
    assert sequences * run.WINDOW == 8192


def test_rows_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each provider, checked against float64 before it was timed; what is wrong is not timed."""
    small = ["--model", "llama-25m", "--layers", "1", "--density", "0.5", "--tokens", "512", "--per", "batch"]
    rest = ["--dtype", "float32", "--seconds", "0", "--threads", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *small, *rest])
    freed: list[bool] = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: freed.append(True))
    monkeypatch.setattr(providers, "measure", lambda *_: Costs())
    threads = torch.get_num_threads()
    try:
        run.main()
        rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert [row["provider"] for row in rows] == ["published", "batched", "ours"]
        for row in rows:
            assert 0 < row["error"] < run.TOLERANCE and row["low"] <= row["median"] <= row["high"]
            assert row["tokens_per_second"] == pytest.approx(512 / row["median"])
            assert row["of_bandwidth"] == pytest.approx(row["kept_bytes"] / row["median"] / row["bandwidth"])
        assert [row["passes"] for row in rows[:2]] == [2, 1] and freed == [True]
        assert capsys.readouterr().out.count("of the ceiling") == 3
        for name, value in (("TOLERANCE", 0.0), ("ceiling", lambda *_: 1.0), ("bandwidth", lambda *_: 1.0)):
            monkeypatch.setattr(run, name, value)
        with pytest.raises(SystemExit, match=r"published on llama-25m: losses are off by .*; it is not timed"):
            run.main()
    finally:
        torch.set_num_threads(threads)


def test_number_formats_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with float32, by its speed and by what it makes of masks."""
    monkeypatch.setattr(sys, "argv", ["dtypes.py", "--model", "embedded", "--dtype", "bfloat16"])
    for name, less in (("REPEATS", 1), ("COMPARED", 4), ("WINDOWS", 2), ("WINDOW", 32)):
        monkeypatch.setattr(dtypes, name, less)
    threads = torch.get_num_threads()
    try:
        dtypes.main()
    finally:
        torch.set_num_threads(threads)
    exact, shorter = capsys.readouterr().out.splitlines()
    assert exact.split()[:2] == ["embedded", "float32"] and float(exact.split()[-1]) == pytest.approx(1)
    assert shorter.split()[:2] == ["embedded", "bfloat16"] and 0.99 < float(shorter.split()[-1]) < 1


def test_the_table_holds_the_last_row_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how it compares to the others of the same step; the picture is one; without rows, neither is made."""
    row = {
        "model": "m", "layers": 2, "dtype": "bfloat16", "density": 0.5, "tokens": 2048, "masks_per": "batch",
        "low": 0.1, "high": 0.9, "tokens_per_second": 4096.0, "of_ceiling": 0.25, "peak_bytes": None, "machine": "x",
        "commit": "abc",
    }  # fmt: skip
    medians = [("ours", 9.0), ("published", 0.8), ("batched", 0.6), ("ours", 0.4)]
    rows = [{**row, "provider": name, "median": median} for name, median in medians]
    rows[-1]["of_bandwidth"] = 0.125  # which earlier rows had not
    lines = show.table(rows).splitlines()
    assert [line.split(" | ")[9] for line in lines if " | batch | " in line] == ["-", "-", "12%"]
    assert [line.split(" | ")[3:7] for line in lines if " | batch | " in line] == [
        ["published", "800.0 (100.0 to 900.0)", "4,096", "1.00"],
        ["batched", "600.0 (100.0 to 900.0)", "4,096", "1.33"],
        ["ours", "400.0 (100.0 to 900.0)", "4,096", "2.00"],
    ]
    assert show.picture(rows).startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["show.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no rows"):
        show.main()
    assert not any(tmp_path.iterdir())
