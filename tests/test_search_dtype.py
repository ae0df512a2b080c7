"""A run may search on weights in a shorter number format; what it slices and reports is the model itself."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised import needs_torchao
from safetensors.torch import load_file
from tiny_models import random_tokens, tiny_model
from tiny_run import VOCABULARY, Place, in_one_sentence, read_json, run, succeed, tiny_folder
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bernprune.config import make_config
from bernprune.evaluation.perplexity import mean_loss
from bernprune.models.loading import load_model
from bernprune.models.view import describe
from bernprune.run import forecast, opening, pipeline
from bernprune.run.stage import set_stage

all_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int8", marks=needs_torchao)])


@all_dtypes
def test_the_model_itself_is_sliced_and_reported(dtype: str, place: Place) -> None:
    """What comes out is what `apply` makes of the original by the plan, and so are its figures; the report says so."""
    done = succeed(*place.prune(f"search.dtype={dtype}", "report.initial_latency=true", "plans.sparsities=[0.2]"))
    report = read_json(place.out / "report.json")
    assert report["search"]["dtype"] == dtype and report["model"]["dtype"] == "torch.float32"
    succeed("apply", str(place.out / "plan.json"), str(place.model), "applied")
    found, expected = (load_file(folder / "model.safetensors") for folder in (place.out / "model", Path("applied")))
    assert found.keys() == expected.keys() and all(value.equal(expected[name]) for name, value in found.items())
    stage = set_stage(make_config(given(place)))
    losses = {"dense": place.model, "pruned": place.out / "model"}
    for name, folder in losses.items():
        assert report["loss"][name] == pytest.approx(mean_loss(load_model(str(folder)), stage.eval_windows_WT))
    assert report["search"]["dense_loss"] != report["loss"]["dense"]
    assert report["search"]["dense_loss"] == pytest.approx(report["loss"]["dense"], rel=1e-2)
    perplexity = f"{math.exp(report['search']['dense_loss']):.3f}"
    assert f"searched in {dtype}, where the dense perplexity is {perplexity}; what is reported" in done.out
    assert report["latency"].keys() == {"dense", "initial", "pruned"}
    loaded = AutoModelForCausalLM.from_pretrained(place.out / "model", trust_remote_code=True)
    assert loaded(input_ids=random_tokens(2, 8, vocabulary=VOCABULARY)).logits.isfinite().all()


def given(place: Place, **model: Any) -> dict[str, Any]:
    data = {"text": str(place.text), "window": 16, "eval_tokens": 320}
    return {"model": {"path": str(place.model), **model}, "data": data}


def test_losses_of_masks_are_those_of_the_model_itself(place: Place) -> None:
    """Of the metric's selections and of other plans: a run that searches nothing reports the same in both formats."""
    reports = []
    for dtype in ("same", "bfloat16"):
        out = place.folder / dtype
        more = (f"search.dtype={dtype}", "search.sequences=0", "plans.sparsities=[0.2]", "initial.score=random")
        succeed(*place.prune(*more, out=out))
        reports.append(read_json(out / "report.json"))
    for name in ("dense", "uniform", "initial", "pruned"):
        assert reports[0]["loss"][name] == reports[1]["loss"][name]
    assert reports[0]["plans"] == reports[1]["plans"]
    assert [report["search"]["dtype"] for report in reports] == ["float32", "bfloat16"]
    assert reports[0]["search"]["dense_loss"] == reports[0]["loss"]["dense"] != reports[1]["search"]["dense_loss"]


@all_dtypes
def test_the_two_are_never_held_at_once(dtype: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model itself is loaded, what was searched on is gone, whoever still holds its modules."""
    opened: list[Any] = []

    def watched(*given: Any, **named: Any) -> Any:
        assert not any(list(model.parameters()) for model in opened)
        opened.append(load_model(*given, **named))
        return opened[-1]

    monkeypatch.setattr(opening, "load_model", watched)
    succeed(*place.prune(f"search.dtype={dtype}"))
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("units", "least", "model", "checkpoint", "expected"),
    [
        (True, 0, {}, torch.float32, "bfloat16"),
        (False, 0, {}, torch.float32, "same"),
        (True, 10**9, {}, torch.float32, "same"),
        (True, 0, {"dtype": "float32"}, torch.float32, "same"),
        (True, 0, {}, torch.bfloat16, "same"),
        (True, 0, {}, torch.float16, "same"),
    ],
    ids=["large", "no units", "small", "asked for float32", "bfloat16", "float16"],
)
def test_when_a_shorter_format_is_chosen(
    units: bool,
    least: int,
    model: dict[str, str],
    checkpoint: torch.dtype,
    expected: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it pays, and nobody has said what the model is to run in."""
    monkeypatch.setattr(opening, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(opening, "_LARGE", least)
    if checkpoint != torch.float32:
        load_model(str(place.model)).to(checkpoint).save_pretrained(place.model)
    stage = set_stage(make_config(given(place, **model)))
    assert stage.dtype == expected
    assert stage.view.model.dtype == (torch.bfloat16 if expected == "bfloat16" else checkpoint)


def test_what_a_model_has_is_the_same(place: Place) -> None:
    """To be searched in its own format, it is not loaded twice."""
    load_model(str(place.model)).bfloat16().save_pretrained(place.model)
    stage = set_stage(make_config({**given(place), "search": {"dtype": "bfloat16"}}))
    assert stage.dtype == "same" and stage.with_weights("same") is stage


@pytest.mark.parametrize("began", ["same", "bfloat16"])
def test_a_run_goes_on_in_the_format_that_it_began_with(
    began: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor where another would be chosen; and it goes on to the bit."""
    monkeypatch.setattr(opening, "_LARGE", 0)
    monkeypatch.setattr(opening, "has_bfloat16_units", lambda: began == "bfloat16")
    succeed(*place.prune("search.costs=fixed"))
    plan, before = (place.out / "plan.json").read_bytes(), read_json(place.out / "report.json")
    monkeypatch.setattr(opening, "has_bfloat16_units", lambda: began == "same")
    formats, quick = set[torch.dtype](), pipeline.quick_products

    def noted(device: torch.device, *dtypes: torch.dtype) -> Any:
        formats.update(dtypes)
        return quick(device, *dtypes)

    monkeypatch.setattr(pipeline, "quick_products", noted)
    (place.out / "report.json").unlink()
    for path in (place.out / "checkpoints").iterdir():
        path.unlink()
    succeed("resume", str(place.out))
    after = read_json(place.out / "report.json")
    assert before["search"]["dtype"] == after["search"]["dtype"] == {"same": "float32"}.get(began, began)
    assert (place.out / "plan.json").read_bytes() == plan and after["loss"] == before["loss"]
    assert getattr(torch, before["search"]["dtype"]) in formats, "products in it are quick where it is slow"


def test_what_is_cut_is_what_was_searched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself is read again after the search: if it is another by then, that is refused. Given back, the run
    goes on."""
    weights, search = place.model / "model.safetensors", pipeline.run_search
    before = weights.read_bytes()

    def swapped(*given: Any, **named: Any) -> Any:
        found = search(*given, **named)
        shutil.copy(tiny_folder(place.folder / "other", seed=5) / "model.safetensors", weights)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_search", swapped)
        said = in_one_sentence(run(*place.prune("search.dtype=bfloat16")))
    assert f"the weights of {place.model} are not those that were searched any more" in said
    assert "continue with: bernprune resume" in said and not (place.out / "model").exists()
    assert "the model's weights are not those" in in_one_sentence(run("resume", str(place.out)))
    weights.write_bytes(before)
    succeed("resume", str(place.out))


@pytest.mark.parametrize("command", ["prune", "apply", "units"])
def test_saved_quantised_weights_are_refused(command: str, place: Place, finished: Path) -> None:
    """With what to give instead; nothing is left behind."""
    model = place.model_with(quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only"})
    before = place.contents()
    arguments = {
        "prune": place.prune(model=model),
        "apply": ["apply", str(finished / "plan.json"), str(model), "applied"],
        "units": ["units", str(model)],
    }[command]
    sentence = in_one_sentence(run(*arguments))
    assert f"{model} are saved quantised" in sentence and "give the original" in sentence
    assert "search.dtype=int8" in sentence and place.contents() == before


def test_int8_without_torchao(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is loaded, with how to get it."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(opening, "load_model", None)
    sentence = in_one_sentence(run(*place.prune("search.dtype=int8")))
    assert "need torchao" in sentence and 'pip install ".[quantised]"' in sentence
    assert not place.out.exists()


def test_what_kernels_search_on_is_measured_without_them(place: Place) -> None:
    """If they cannot run the model itself, for its format."""
    load_model(str(place.model)).double().save_pretrained(place.model)
    stage = set_stage(make_config({**given(place), "backend": "triton", "search": {"dtype": "bfloat16"}}))
    assert (stage.ops.name, stage.view.model.dtype) == ("triton", torch.bfloat16)
    stage = stage.with_weights("same")
    assert (stage.ops.name, stage.view.model.dtype) == ("torch", torch.float64)


@needs_torchao
def test_kernels_mask_what_is_quantised(place: Place) -> None:
    """Before it multiplies by itself."""
    stage = set_stage(make_config({**given(place), "backend": "triton", "search": {"dtype": "int8"}}))
    assert (stage.ops.name, stage.dtype) == ("triton", "int8")
    assert stage.view.opaque is not None


@pytest.mark.parametrize(("free", "expected"), [(2**31 + 399, False), (2**31 + 400, True)])
def test_what_does_not_fit_on_a_gpu_stays_on_the_processor(
    free: int, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With room for activations; that is said."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    weights = nn.Linear(10, 10, bias=False)
    model = SimpleNamespace(parameters=weights.parameters, dtype=torch.float32)
    assert opening._fits(model, torch.device("cuda")) == expected
    told = "cuda has no room for the model in torch.float32: it stays on the processor"
    assert [record.getMessage() for record in caplog.records] == ([] if expected else [told])
    assert opening._fits(model, torch.device("cpu"))


@pytest.mark.parametrize("failing", ["no room", "full on the way", None])
def test_the_model_itself_is_sliced_where_there_is_room(
    failing: str | None, place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the device, or else on the processor, also if the device was full only on the way."""
    moved: list[str] = []

    class Watched(LlamaForCausalLM):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moved.append(str(device))
            if failing == "full on the way" and str(device) == "meta":
                raise torch.OutOfMemoryError
            return self

    def load(*_: Any, **__: Any) -> Any:
        model = load_model(str(place.model))
        model.__class__ = Watched
        return model

    monkeypatch.setattr(opening, "load_model", load)
    monkeypatch.setattr(opening, "_fits", lambda model, device: failing != "no room")
    opened = opening.open_view(make_config(given(place)), torch.device("meta"), "same", anywhere=True)
    assert opened.view.space.size > 0
    assert moved == {"no room": [], "full on the way": ["meta", "cpu"], None: ["meta"]}[failing]
    assert ("it stays on the processor" in caplog.text) == (failing == "full on the way")


def test_memory_is_that_of_the_model_twice_and_of_what_a_step_sums() -> None:
    """A clean process loads the result again; a GPU gives the first one up before that."""
    assert forecast._to_verify(torch.device("cpu"), 700) == 1400
    assert forecast._to_verify(torch.device("cuda"), 700) == 0
    view = describe(tiny_model("llama"))
    reading, plain = (make_config({"search": {"by_activity": by_activity}}) for by_activity in (True, False))
    channels = sum(layer.channels for layer in view.architecture.layers)
    more = forecast._activations(view, reading) - forecast._activations(view, plain)
    assert more == 3 * 8 * reading.search.windows * channels


def test_memory_holds_what_a_repair_keeps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of weights, and hidden states."""
    config = make_config(given(place))

    def told() -> str:
        return next(line for line in forecast.forecast(config).splitlines() if line.startswith("memory"))

    before = told()
    assert "about 3.00 GiB" not in before
    for name in ("kept_bytes", "states_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(forecast, name, lambda *_: 3 * 2**30)
            assert "about 3.00 GiB" in told()


@all_dtypes
def test_what_a_run_would_take(dtype: str, place: Place) -> None:
    """Of memory for weights while it is searched, and for the model itself."""
    out = succeed("units", str(place.model), "--set", f"search.dtype={dtype}", "--set", "data.window=16").out
    assert f"GiB in {dtype} while it is searched, " in out and " GiB when it is sliced)" in out
    assert "while it is searched" not in succeed("units", str(place.model), "--set", "data.window=16").out
