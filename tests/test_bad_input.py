"""Whatever a user gets wrong ends in one sentence, exit code 2 and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from spaces import FLAT
from tiny_models import tiny_model
from tiny_run import (
    KV_GROUPS,
    METHODS,
    PASSES,
    POSITIONS,
    SETTINGS,
    UNREAD_PASSES,
    VOCABULARY,
    Place,
    in_one_sentence,
    run,
    settings,
    succeed,
    tiny_text,
    tiny_tokenizer,
    words,
)
from transformers import AutoModelForCausalLM

from bernprune.config import RunConfig, make_config
from bernprune.models.architecture import architecture_of
from bernprune.models.families import FAMILIES
from bernprune.names import BaselineName, MasksPer, MethodName, PresetName, ScoreName
from bernprune.run import pipeline
from bernprune.run.folder import FREE_SETTINGS, RunFolder
from bernprune.run.plans import Learned
from bernprune.sections import PolicyConfig
from bernprune.settings import merge, parse_settings
from bernprune.storage import write_json
from bernprune.units import KeepPlan, LayerPlan

# --- the table: what is tried, and what the sentence must say ---

CEILING = PolicyConfig().ceiling
REINFORCE = METHODS["reinforce"]


def _corrupt_weights(place: Place) -> Path:
    weights = place.copied() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return weights.parent


def _weights_that_are_nan(place: Place) -> Path:
    weights = place.copied() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return weights.parent


def _weights_missing(place: Place) -> Path:
    weights = place.copied() / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    return weights.parent


def _other_tokenizer(place: Place) -> Path:
    tiny_tokenizer(VOCABULARY + 30).save_pretrained(place.copied())
    return place.folder / "changed"


def _not_json(place: Place) -> Path:
    (place.copied() / "config.json").write_text("{")
    return place.folder / "changed"


def _a_list(place: Place) -> Path:
    (place.copied() / "config.json").write_text("[]")
    return place.folder / "changed"


def _broken_tokenizer(place: Place) -> Path:
    (place.copied() / "tokenizer.json").write_text("{}")
    return place.folder / "changed"


def _without_tokenizer(place: Place) -> Path:
    for path in place.copied().glob("tokenizer*"):
        path.unlink()
    return place.folder / "changed"


def _without(place: Place, name: str) -> Path:
    (place.copied() / name).unlink()
    return place.folder / "changed"


def _config_of(place: Place, *more: str) -> RunConfig:
    """The config that ``place.prune`` resolves to."""
    given = {"model": {"path": str(place.model)}, "data": {"text": str(place.text)}}
    return make_config(merge(given, parse_settings([*SETTINGS, *more])))


def _unfinished(place: Place, *more: str) -> Path:
    folder = RunFolder(place.out)
    with folder.locked():
        folder.start(_config_of(place, *more))
    return place.out


def _finished(place: Place) -> Path:
    (_unfinished(place) / "report.json").write_text("{}")
    return place.out


def _damaged_report(place: Place) -> Path:
    (_unfinished(place) / "report.json").write_text('{"model"')
    return place.out


def _damaged_config(place: Place) -> Path:
    (_unfinished(place) / "config.yaml").write_text("seed: [")
    return place.out


def _folder(place: Place, name: str) -> Path:
    (place.folder / name).mkdir(parents=True)
    return place.folder / name


def _something_else(place: Place) -> Path:
    place.out.mkdir(parents=True)
    (place.out / "thesis.tex").write_text("precious")
    return place.out


def _of_another_program(place: Place) -> Path:
    """Many have a config.yaml, and a folder for checkpoints."""
    (place.out / "checkpoints").mkdir(parents=True)
    (place.out / "checkpoints/a.pt").write_text("precious")
    (place.out / "config.yaml").write_text("lr: 0.1")
    return place.out


def _of_no_settings(place: Place) -> Path:
    place.out.mkdir(parents=True)
    (place.out / "config.yaml").write_text("{a line")
    return place.out


def _of_the_user(place: Place) -> Path:
    """A configuration of one's own beside a model: what a run would replace."""
    place.out.mkdir(parents=True)
    (place.out / "config.yaml").write_text(f"model: {{path: {place.model}}}\ndata: {{}}\nbudget: {{}}\n")
    (place.out / "model").symlink_to(place.model)
    return place.out


def _input_within(place: Place) -> list[str]:
    """A run whose text is what an earlier run in the same folder left."""
    _finished(place)
    (place.out / "plans").mkdir()
    return [*place.prune(text=tiny_text(place.out / "plans" / "text.txt", seed=3)), "--overwrite"]


def _select(out: str | Path, *given: str) -> list[str]:
    return ["select", str(out), *given]


def _learned(place: Place, *more: str) -> Path:
    """A run that is done with learning; what it learned is of units made by hand."""
    numbers_U, folder = torch.linspace(0, 1, FLAT.size, dtype=torch.float64), RunFolder(_unfinished(place, *more))
    Learned(FLAT, numbers_U, numbers_U.exp(), numbers_U > 0.3).write(folder.learned)
    write_json(folder.plan, FLAT.plan(numbers_U > 0.3).to_dict())
    return place.out


def _learned_elsewhere(place: Place) -> Path:
    write_json(RunFolder(_learned(place)).plan, FLAT.plan(torch.ones(FLAT.size, dtype=torch.bool)).to_dict())
    return place.out


def _damaged_learned(place: Place) -> Path:
    path = _learned(place) / "learned.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return place.out


def _plan(place: Place, content: Any) -> list[str]:
    path = place.file("plan.json", content if isinstance(content, str) else json.dumps(content))
    return ["apply", str(path), str(place.model), str(place.out)]


def _plan_of(place: Place, model: Path, **sizes: Any) -> list[str]:
    """Of a model in a folder, keeping the first unit of each kind in each layer."""
    architecture = architecture_of(AutoModelForCausalLM.from_pretrained(model))
    plan = KeepPlan(architecture, tuple(LayerPlan((0,), (0,)) for _ in architecture.layers)).to_dict()
    return [*_plan(place, plan | {"architecture": plan["architecture"] | sizes})[:2], str(model), str(place.out)]


def _plan_of_another_model(place: Place) -> list[str]:
    architecture = architecture_of(tiny_model("llama"))
    layers = tuple(LayerPlan((0,), (0,)) for _ in architecture.layers)
    return _plan(place, KeepPlan(architecture, layers).to_dict())


Try = Callable[[Place], list[str]]
BAD: dict[str, tuple[Try, tuple[str, ...]]] = {
    # models
    "model-missing": (lambda p: p.prune(model=p.folder / "none"), ("none", "does not exist")),
    "model-is-a-file": (lambda p: p.prune(model=p.text), ("text.txt", "file", "folder")),
    "model-without-config": (lambda p: p.prune(model=p.folder / "temporary"), ("no config.json",)),
    "model-config-not-json": (lambda p: p.prune(model=_not_json(p)), ("configuration", "JSON")),
    "model-config-a-list": (lambda p: p.prune(model=_a_list(p)), ("states no model_type",)),
    "model-config-of-wrong-type": (lambda p: p.prune(model=p.model_with(hidden_size="x")), ("hidden_size", "int")),
    "family-unknown": (lambda p: p.prune(model=p.model_with(model_type="gpt2")), ("'gpt2'", *FAMILIES)),
    "family-nobody-knows": (lambda p: p.prune(model=p.model_with(model_type="none")), ("'none'", *FAMILIES)),
    "multiple-more-than-units-sees": (
        lambda p: ["units", str(p.model), *settings("data.window=16", "budget.channel_multiple=64")],
        ("19 units", "64"),
    ),
    "family-unknown-to-units": (lambda p: ["units", str(p.model_with(model_type="gpt2"))], ("'gpt2'", *FAMILIES)),
    "model-already-pruned": (lambda p: p.prune(model=p.model_with(model_type="bernprune_llama")), ("already pruned",)),
    "weights-corrupt": (lambda p: p.prune(model=_corrupt_weights(p)), ("changed", "cannot be loaded")),
    "weights-not-there": (lambda p: p.prune(model=_without(p, "model.safetensors")), ("no file", "model.safetensors")),
    "weights-incomplete": (lambda p: p.prune(model=_weights_missing(p)), ("layers.2.mlp.down_proj", "lacks 1")),
    "weights-of-another-size": (lambda p: p.prune(model=p.model_with(intermediate_size=23)), ("[36, 19]", "[36, 23]")),
    "weights-nan": (lambda p: p.prune(model=_weights_that_are_nan(p)), ("nan", "not finite")),
    "tokenizer-mismatch": (lambda p: p.prune(model=_other_tokenizer(p)), ("tokenizer", "id", str(VOCABULARY))),
    "tokenizer-missing": (lambda p: p.prune(model=_without_tokenizer(p)), ("no tokenizer", "tokenizer.json")),
    "tokenizer-broken": (lambda p: p.prune(model=_broken_tokenizer(p)), ("tokenizer", "cannot be loaded")),
    # text
    "text-missing": (lambda p: p.prune(text=p.folder / "none.txt"), ("none.txt", "does not exist")),
    "text-empty": (lambda p: p.prune(text=p.file("empty.txt", "")), ("empty.txt", "is empty")),
    "text-blank": (lambda p: p.prune(text=p.file("blank.txt", " \n")), ("blank.txt", "no text")),
    "text-too-short": (lambda p: p.prune(text=p.file("short.txt", "a b c")), ("short.txt", "too short", "16")),
    "text-too-short-for-a-tenth": (lambda p: p.prune(text=p.file("s.txt", words(30))), ("s.txt, last tenth", "short")),
    "text-too-short-for-a-step": (lambda p: p.prune("search.windows=9999", "search.sequences=29997"), ("9,999",)),
    "text-too-short-to-score": (  # said before weights are looked at
        lambda p: [
            *p.prune("initial.window=64", text=p.file("s.txt", words(15)), model=_weights_that_are_nan(p)),
            *("--eval-text", str(p.file("e.txt", words(40)))),
        ],
        ("s.txt", "too short", "64"),
    ),
    "text-not-utf8": (lambda p: p.prune(text=p.file("latin.txt", b"caf\xe9 " * 99)), ("latin.txt", "UTF-8")),
    "text-without-field": (lambda p: p.prune(text=p.file("t.jsonl", '{"body": "x"}')), ("t.jsonl", "line 1", "text")),
    "eval-text-missing": (lambda p: [*p.prune(), "--eval-text", "none.txt"], ("none.txt", "does not exist")),
    "eval-text-blank": (lambda p: [*p.prune(), "--eval-text", ""], ("text source is blank",)),
    "eval-text-too-short": (lambda p: [*p.prune(), "--eval-text", str(p.file("e.txt", "a b"))], ("e.txt", "too short")),
    "eval-join-without-text": (lambda p: p.prune("data.eval_join=x"), ("data.eval_join", "data.eval_text")),
    # budgets
    "sparsity-0": (lambda p: [*p.prune(), "--sparsity", "0"], ("budget.sparsity", "greater than 0", "'0'")),
    "sparsity-negative": (lambda p: [*p.prune(), "--sparsity", "-0.3"], ("budget.sparsity", "greater than 0", "-0.3")),
    "sparsity-1": (lambda p: [*p.prune(), "--sparsity", "1"], ("budget.sparsity", "less than 1", "'1'")),
    "sparsity-percent": (lambda p: [*p.prune(), "--sparsity", "30"], ("budget.sparsity", "less than 1", "30")),
    "sparsity-nan": (lambda p: [*p.prune(), "--sparsity", "nan"], ("budget.sparsity", "finite", "nan")),
    "sparsity-infinite": (lambda p: [*p.prune(), "--sparsity", "inf"], ("budget.sparsity", "finite", "inf")),
    "sparsity-text": (lambda p: [*p.prune(), "--sparsity", "much"], ("budget.sparsity", "number", "much")),
    "sparsity-beyond-ceiling": (
        lambda p: [*p.prune(), "--sparsity", f"{(1 - CEILING) / 2:g}"],
        ("policy.ceiling", f"{(1 + CEILING) / 2:g}", f"{CEILING:g}"),
    ),
    "minimums-impossible": (
        lambda p: p.prune("budget.min_channels=18", f"budget.min_kv_groups={KV_GROUPS}"),
        ("minimums", "70.0%", "0.3"),
    ),
    "minimum-more-than-there-is": (lambda p: p.prune("budget.min_channels=20"), ("19 units", "channel", "20")),
    "multiple-more-than-there-is": (lambda p: p.prune("budget.channel_multiple=64"), ("19 units", "64")),
    "separate-pools-nested": (
        lambda p: p.prune("budget.pools=separate", "granularity=[layer, channel]"),
        ("separate pools", "layer"),
    ),
    "sequences-below-a-step": (
        lambda p: p.prune(f"search.sequences={PASSES - 1}"),
        ("search.sequences", f"one step of {PASSES}", f"got {PASSES - 1}"),
    ),
    "sequences-below-a-round-of-a-batch": (
        lambda p: p.prune(*METHODS["posterior-batch"], f"search.sequences={2 * UNREAD_PASSES - 1}"),
        ("search.sequences", f"two steps of {UNREAD_PASSES}", f"got {2 * UNREAD_PASSES - 1}"),
    ),
    "sequences-below-a-matched-step": (
        lambda p: p.prune(*REINFORCE, "search.sequences=7", "search.baseline=matched"),
        ("search.sequences", "one step of 8", "got 7"),
    ),
    "masks-too-few": (
        lambda p: p.prune(*REINFORCE, "search.masks=1"),
        ("leave-one-out", "2 masks", "search.masks is 1"),
    ),
    # methods
    "posterior-of-one-mask": (
        lambda p: p.prune("search.masks=1"),
        ("search.method 'posterior'", "search.masks of 2 or more", "got 1"),
    ),
    **{
        f"posterior-with-{setting}": (
            lambda p, setting=setting: p.prune(setting),
            ("search.method 'posterior'", "policy.floor above 0", "policy.ceiling below 1", "'cost-weighted'"),
        )
        for setting in ("policy.floor=0", "policy.ceiling=1", "policy.projection=published")
    },
    "posterior-with-a-rate": (
        lambda p: p.prune("search.learning_rate=0.05"),
        ("search.learning_rate has no meaning for search.method 'posterior'",),
    ),
    "reinforce-with-rounds": (
        lambda p: p.prune(*REINFORCE, "search.rounds=7"),
        ("search.rounds has no meaning for search.method 'reinforce'",),
    ),
    "paper-by-another-method": (
        lambda p: [*p.prune("search.method=posterior", "search.chunk=null"), "--preset", "paper"],
        ("search.learning_rate, which preset 'paper' sets, has no meaning for search.method 'posterior'",),
    ),
    "method-unknown": (
        lambda p: p.prune("search.method=genetic"),
        ("search.method", "'genetic'", *get_args(MethodName)),
    ),
    "masks-per-unknown": (
        lambda p: p.prune("search.masks_per=token"),
        ("search.masks_per", "'token'", *get_args(MasksPer)),
    ),
    "chunk-does-not-divide": (
        lambda p: p.prune("search.chunk=5"),
        ("search.chunk 5 must divide data.window, which is 16",),
    ),
    "chunk-longer-than-the-window": (
        lambda p: p.prune("search.chunk=32"),
        ("search.chunk 32", "data.window, which is 16"),
    ),
    "chunk-0": (lambda p: p.prune("search.chunk=0"), ("search.chunk", "1", "0")),
    **{
        f"chunk-of-a-{masks_per}": (
            lambda p, masks_per=masks_per: p.prune("search.chunk=4", f"search.masks_per={masks_per}"),
            ("search.chunk 4 needs search.masks_per 'chunk'", f"but that is '{masks_per}'"),
        )
        for masks_per in ("batch", "sequence")
    },
    "discount-without-chunks": (
        lambda p: p.prune("search.discount=1", "search.masks_per=sequence", "search.chunk=null"),
        ("search.discount has no meaning for search.masks_per 'sequence'",),
    ),
    "forgetting-all": (lambda p: p.prune("search.forgetting=1"), ("search.forgetting", "less than 1", "1")),
    "discount-above-1": (lambda p: p.prune("search.discount=1.5"), ("search.discount", "1.5")),
    # settings
    "key-unknown": (lambda p: p.prune("budget.sparsty=0.5"), ("'budget.sparsty'", "'budget.sparsity'")),
    "key-without-section": (lambda p: p.prune("learning_rate=0.1"), ("'search.learning_rate'",)),
    "section-unknown": (lambda p: p.prune("serach.masks=4"), ("'serach'", "'search'")),
    "section-is-a-value": (lambda p: p.prune("search=3"), ("'search'", "section", "3")),
    "type-wrong": (lambda p: p.prune("search.masks=many"), ("search.masks", "integer", "'many'")),
    "type-fraction": (lambda p: p.prune("search.masks=2.5"), ("search.masks", "integer", "2.5")),
    "type-truth": (lambda p: p.prune("search.masks=yes"), ("search.masks", "true or false", "True")),
    "type-of-text": (lambda p: p.prune("model.dtype=[1]"), ("model.dtype", "[1]")),
    "seed-negative": (lambda p: [*p.prune(), "--seed", "-1"], ("seed", "0", "-1")),
    "score-unknown": (lambda p: [*p.prune(), "--score", "wand"], ("initial.score", "'wand'", *get_args(ScoreName))),
    "preset-unknown": (lambda p: [*p.prune(), "--preset", "best"], ("preset", "'best'", *get_args(PresetName))),
    "baseline-unknown": (lambda p: p.prune("search.baseline=mean"), ("baseline", "'mean'", *get_args(BaselineName))),
    "score-misspelt": (
        lambda p: p.prune("initial.score=wandasp"),
        ("unknown; did you mean 'wanda-sp'? known are", "'wandasp'"),
    ),
    "score-of-no-name": (lambda p: p.prune("initial.score=zzzz"), ("score", "unknown; known are wanda-sp")),
    "repair-a-number": (lambda p: p.prune("repair.method=3"), ("repair.method", "'ridge'", "but got 3")),
    "repair-unknown": (lambda p: p.prune("repair.method=rigde"), ("repair.method", "'rigde'", "mean 'ridge'?")),
    "preset-misspelt": (lambda p: [*p.prune(), "--preset", "papper"], ("preset", "'papper'", "mean 'paper'?")),
    "allocation-misspelt": (lambda p: p.prune("initial.allocation=globl"), ("allocation", "mean 'global'?")),
    "nested-alone": (lambda p: p.prune("plans.nested=true"), ("plans.nested", "without plans.sparsities")),
    "flops-window-alone": (lambda p: p.prune("budget.flops_window=64"), ("budget.flops_window", "not of flops")),
    "swing-of-no-channels": (
        lambda p: p.prune("granularity=kv_group", "search.swing=0.5"),
        ("search.swing", "without channel"),
    ),
    "multiple-of-no-channels": (
        lambda p: p.prune("granularity=kv_group", "budget.channel_multiple=2"),
        ("budget.channel_multiple", "without channel"),
    ),
    "granularity-unknown": (lambda p: [*p.prune(), "--granularity", "head"], ("granularity", "'head'", "kv_group")),
    "granularity-twice": (lambda p: [*p.prune(), "--granularity", "channel,channel"], ("granularity", "different")),
    "granularity-empty": (lambda p: p.prune("granularity=[]"), ("granularity", "channel")),
    "set-without-equals": (lambda p: p.prune("search.masks"), ("--set", "'search.masks'", "section.key=value")),
    "set-no-date": (lambda p: p.prune("model.revision=2024-13-01"), ("--set", "YAML", "month")),
    "set-too-deep": (lambda p: p.prune("granularity=" + "[" * 5000), ("--set", "YAML")),
    "set-not-yaml": (lambda p: p.prune("granularity=["), ("--set", "YAML")),
    "config-missing-for-units": (lambda p: ["units", "none.yaml"], ("none.yaml", "does not exist")),
    "config-missing": (lambda p: ["prune", "none.yaml"], ("none.yaml", "does not exist")),
    "config-not-yaml": (lambda p: ["prune", str(p.file("c.yaml", "a: ["))], ("c.yaml", "not YAML")),
    "config-a-list": (lambda p: ["prune", str(p.file("c.yaml", "- a"))], ("c.yaml", "keys and values", "['a']")),
    "config-with-code": (
        lambda p: ["prune", str(p.file("c.yaml", "seed: !!python/tuple [1]"))],
        ("c.yaml", "not YAML", "python/tuple"),
    ),
    "config-no-date": (lambda p: ["prune", str(p.file("c.yaml", "seed: 2024-13-01"))], ("c.yaml", "YAML", "month")),
    "config-false": (lambda p: ["prune", str(p.file("c.yaml", "no"))], ("c.yaml", "keys and values", "False")),
    "config-of-numbers": (lambda p: ["prune", str(p.file("c.yaml", "1: 2"))], ("c.yaml", "keys and values")),
    "config-binary": (lambda p: ["prune", str(p.file("c.yaml", b"\xff\x00"))], ("c.yaml", "cannot be read")),
    "config-a-folder": (lambda p: ["prune", "model"], ("model", "is a folder")),
    "config-section-twice": (
        lambda p: ["prune", str(p.file("c.yaml", "search: {masks: 4}\nsearch: {windows: 4}"))],
        ("c.yaml", "'search' is given twice"),
    ),
    "config-setting-twice": (
        lambda p: ["prune", str(p.file("c.yaml", "search: {masks: 4}\nsearch.masks: 8"))],
        ("c.yaml", "'search.masks' is given twice"),
    ),
    "config-merged-twice": (
        lambda p: ["prune", str(p.file("c.yaml", "search: {<<: {masks: 4}, seed: 4, seed: 5}"))],
        ("c.yaml", "'seed' is given twice"),
    ),
    "config-in-itself": (lambda p: ["prune", str(p.file("c.yaml", "search: &a {masks: *a}"))], ("c.yaml", "alias")),
    "home-of-nobody": (lambda p: p.prune("data.text=~nosuchuser/x.txt"), ("~nosuchuser/x.txt", "does not exist")),
    "config-key-unknown": (lambda p: ["prune", str(p.file("c.yaml", "modle: {}"))], ("'modle'", "'model'")),
    # windows, devices, backends
    "window-beyond-positions": (
        lambda p: p.prune(f"data.window={POSITIONS + 1}", "search.chunk=5"),
        (f"{POSITIONS + 1}", f"{POSITIONS}"),
    ),
    "initial-window-beyond": (lambda p: p.prune(f"initial.window={POSITIONS + 1}"), (f"{POSITIONS + 1}", "positions")),
    "window-1": (lambda p: p.prune("data.window=1"), ("data.window", "2", "1")),
    "units-score-of-blocks": (
        lambda p: ["units", str(p.model), *settings("data.window=16", "initial.score=block-influence")],
        ("block-influence", "cannot rank", "channel"),
    ),
    "units-share-of-no-channels": (
        lambda p: [
            "units",
            str(p.model),
            *settings("data.window=16", "initial.kv_sparsity=0.3", "granularity=kv_group"),
        ],
        ("initial.kv_sparsity",),
    ),
    "units-window-beyond": (lambda p: ["units", str(p.model)], ("128", f"{POSITIONS}")),
    "units-initial-window-beyond": (
        lambda p: ["units", str(p.model), *settings("data.window=16", f"initial.window={POSITIONS + 1}")],
        (f"{POSITIONS + 1}", "positions"),
    ),
    "evaluate-window-beyond": (
        lambda p: ["evaluate", str(p.model), "--text", str(p.text), "--window", "65"],
        ("65", "positions"),
    ),
    "evaluate-less-than-a-window": (
        lambda p: ["evaluate", str(p.model), "--text", str(p.text), "--window", "16", "--tokens", "15"],
        ("16", "15"),
    ),
    "eval-tokens-less-than-a-window": (lambda p: p.prune("data.eval_tokens=15"), ("data.eval_tokens", "16", "15")),
    "evaluate-window-1": (
        lambda p: ["evaluate", str(p.model), "--text", str(p.text), "--window", "1"],
        ("--window", "2"),
    ),
    "cuda-where-there-is-none": (lambda p: p.prune("model.device=cuda"), ("'cuda'", "0 GPUs")),
    "cuda-number-too-high": (lambda p: p.prune("model.device=cuda:99"), ("'cuda:99'", "GPUs")),
    "device-unknown": (lambda p: p.prune("model.device=tpu"), ("'tpu'", "cpu")),
    "triton": (lambda p: p.prune("backend=triton"), ("triton", "cannot run")),
    # the run folder
    "out-under-a-file": (lambda p: p.prune(out=p.text / "out"), ("text.txt", "not a writable folder")),
    "out-under-proc": (lambda p: p.prune(out=Path("/proc/bernprune")), ("/proc", "cannot be written")),
    "out-is-a-file": (lambda p: p.prune(out=p.text), ("text.txt", "is a file", "folder")),
    "out-name-not-utf8": (lambda p: p.prune(out=p.folder / "b\udcff"), ("b\\udcff'", "not UTF-8")),
    "text-part-of-a-split": (
        lambda p: [*p.prune(), "--text", "allenai/c4:en:train[:50%]"],
        ("taken whole", "train[:50%]"),
    ),
    "text-part-of-the-embedded": (lambda p: [*p.prune(), "--text", "embedded:train"], ("embedded:train", "no parts")),
    "text-name-not-utf8": (lambda p: p.prune(text=p.folder / "b\udcff.txt"), ("data.text", "UTF-8")),
    "out-name-too-long": (lambda p: p.prune(out=p.folder / ("x" * 300)), ("cannot be written", "too long")),
    "out-holds-something-else": (lambda p: p.prune(out=_something_else(p)), ("not empty", "no bernprune run")),
    "out-something-else-overwritten": (
        lambda p: [*p.prune(out=_something_else(p)), "--overwrite"],
        ("not empty", "no bernprune run"),
    ),
    "out-of-another-program": (
        lambda p: [*p.prune(out=_of_another_program(p)), "--overwrite"],
        ("not empty", "no bernprune run"),
    ),
    "out-of-no-settings": (lambda p: p.prune(out=_of_no_settings(p)), ("not empty", "no bernprune run")),
    "resume-another-program": (
        lambda p: ["resume", str(_of_another_program(p))],
        ("config.yaml", "not what a run leaves", "'lr'"),
    ),
    "scores-over-a-model": (
        lambda p: ["scores", str(p.model), "--score", "magnitude", "--out", str(p.model / "model.safetensors")],
        ("model.safetensors", "holds no scores"),
    ),
    "scores-over-a-folder": (
        lambda p: ["scores", str(p.model), "--score", "magnitude", "--out", str(_folder(p, "s.safetensors"))],
        ("s.safetensors", "holds no scores"),
    ),
    "out-of-another-config": (lambda p: p.prune(out=_unfinished(p, "seed=5")), ("unfinished", "seed is 5", "0 here")),
    "out-finished": (lambda p: p.prune(out=_finished(p)), ("finished run", "--overwrite")),
    "out-of-the-user": (
        lambda p: [*p.prune(out=_of_the_user(p)), "--overwrite"],
        ("is not empty and holds no bernprune run",),
    ),
    "out-around-the-text": (_input_within, ("data.text", "lies in", "would replace it")),
    "resume-finished": (lambda p: ["resume", str(_finished(p)), "--finish"], ("is finished", "model")),
    "resume-damaged-report": (lambda p: ["resume", str(_damaged_report(p))], ("report.json is damaged",)),
    "resume-nothing": (lambda p: ["resume", "temporary"], ("temporary", "no bernprune run")),
    "resume-what-never-began": (
        lambda p: ["resume", str(_folder(p, "begun/.lock").parent)],
        ("no bernprune run", "begins anew by the bernprune prune command"),
    ),
    "a-model-for-a-config": (
        lambda p: ["prune", str(p.model)],
        ("is a folder", "a model is given by --model", "resume goes on"),
    ),
    **{
        f"resume-with-{setting}": (
            lambda p, setting=setting: ["resume", str(_unfinished(p)), "--set", setting],
            (f"--set '{setting}' is not possible here", *FREE_SETTINGS),
        )
        for setting in ("search.masks=4", "search.rows=4", "search={rows_per_forward: 4}", "reporting=1")
    },
    "resume-out-of-range": (
        lambda p: ["resume", str(_unfinished(p)), "--set", "search.rows_per_forward=0"],
        ("search.rows_per_forward", "1", "0"),
    ),
    "resume-damaged-config": (lambda p: ["resume", str(_damaged_config(p))], ("config.yaml", "not YAML")),
    "overwrite-by-a-bad-run": (
        lambda p: [*p.prune(out=_finished(p), model=_weights_that_are_nan(p)), "--overwrite"],
        ("not finite",),
    ),
    # plans
    "plan-missing": (lambda p: ["apply", "none.json", str(p.model), str(p.out)], ("none.json", "does not exist")),
    "plan-not-json": (lambda p: _plan(p, "keep it all"), ("plan.json", "cannot be read")),
    "plan-nested-without-end": (lambda p: _plan(p, "[" * 100_000), ("plan.json", "cannot be read")),
    "plan-something-else": (lambda p: _plan(p, {"a": 1}), ("plan.json: this is not a plan", "has no 'format'")),
    "plan-a-list": (lambda p: _plan(p, []), ("not a plan",)),
    "plan-of-another-format": (lambda p: _plan(p, {"format": 99}), ("format 99", "1")),
    "plan-of-another-model": (_plan_of_another_model, ("plan", "another model", "4 layers against 3")),
    "plan-of-words": (lambda p: _plan_of(p, p.model, hidden_size="32"), ("not a plan", "whole numbers")),
    "plan-of-a-model-that-gives-nan": (
        lambda p: _plan_of(p, _weights_that_are_nan(p)),
        ("outputs are not finite, first those of model.",),
    ),
    "apply-a-text-that-nothing-reads": (
        lambda p: [*_plan_of(p, p.model), *settings("data.text=none.txt")],
        ("--text", "--repair is 'none'"),
    ),
    "plan-into-a-file": (lambda p: [*_plan_of_another_model(p)[:3], str(p.text)], ("text.txt", "folder")),
    "plan-into-something-else": (
        lambda p: [*_plan_of_another_model(p)[:3], str(_something_else(p))],
        ("exists already",),
    ),
    "apply-with-another-setting": (
        lambda p: [*_plan_of_another_model(p), *settings("seed=3")],
        ("--set 'seed=3' is not possible here", "model"),
    ),
    "evaluate-with-another-setting": (
        lambda p: ["evaluate", str(p.model), "--text", str(p.text), *settings("data.window=16")],
        ("--set 'data.window=16' is not possible here", "model"),
    ),
    # plans for other sparsities
    "plans-too-high": (
        lambda p: p.prune("plans.sparsities=[0.2, 0.5]"),
        ("plans.sparsities", "0.5", "0.3 explores 0.15 to 0.45"),
    ),
    "plans-too-low": (
        lambda p: [*p.prune("plans.sparsities=[0.2]"), "--sparsity", "0.5"],
        ("plans.sparsities", "0.2", "0.5 explores 0.25 to 0.75"),
    ),
    "plans-not-a-number": (lambda p: p.prune("plans.sparsities=[x]"), ("plans.sparsities", "number", "'x'")),
    "also-the-same": (lambda p: p.prune("initial.also=[flap, wanda-sp]"), ("initial.also", "flap, wanda-sp")),
    "also-twice": (lambda p: p.prune("initial.also=[flap, flap]"), ("initial.also", "flap, flap")),
    "also-unknown": (lambda p: p.prune("initial.also=[flop]"), ("initial.also", "flop", "magnitude")),
    "also-of-gradients": (
        lambda p: p.prune("preset=reinforce", "initial.also=[flap]"),
        ("initial.also", "'reinforce'"),
    ),
    "two-wrong-levels": (lambda p: [*p.prune(), "--granularity", "foo,bar"], ("'kv_group'", "got 'foo'")),
    "plans-in-one-file": (
        lambda p: p.prune("plans.sparsities=[0.2500001, 0.2500002]"),
        ("plans.sparsities", "differ", "0.25, 0.25"),
    ),
    "also-flap-of-blocks": (
        lambda p: p.prune("initial.also=[flap]", "granularity=[attention, ffn]"),
        ("'flap'", "granularity"),
    ),
    "sequences-in-words": (
        lambda p: p.prune("search.sequences=many"),
        ("'search.sequences'", "integer", "'auto'", "'many'"),
    ),
    "sequences-below-0": (lambda p: p.prune("search.sequences=-1"), ("'search.sequences'", "0 or", "-1")),
    "default-sequences-too-few": (
        lambda p: p.prune("search.sequences=null", "search.masks=5000"),
        ("search.masks", "search.windows", "8192", "default for this model"),
    ),
    "plans-twice": (
        lambda p: p.prune("plans.sparsities=[0.2, 0.4, 0.2]"),
        ("plans.sparsities", "differ", "0.2, 0.4, 0.2"),
    ),
    "plans-nan": (lambda p: p.prune("plans.sparsities=[.nan]"), ("plans.sparsities", "finite", "nan")),
    "plans-of-all": (lambda p: p.prune("plans.sparsities=[1]"), ("plans.sparsities", "less than 1", "1")),
    "plans-beyond-minimums": (
        lambda p: p.prune("plans.sparsities=[0.2, 0.45]", "budget.min_kv_groups=2", "budget.min_channels=5"),
        ("minimums", "55.0%", "0.45"),
    ),
    "select-nothing": (lambda p: _select("temporary", "--sparsity", "0.2"), ("temporary", "no bernprune run")),
    "select-missing": (lambda p: _select("none", "--sparsity", "0.2"), ("none", "no bernprune run")),
    "select-unfinished": (
        lambda p: _select(_unfinished(p), "--sparsity", "0.2"),
        ("not learned yet", "learned.safetensors is missing"),
    ),
    "select-damaged": (
        lambda p: _select(_damaged_learned(p), "--sparsity", "0.2"),
        ("learned.safetensors", "damaged"),
    ),
    "select-elsewhere": (
        lambda p: _select(_learned_elsewhere(p), "--sparsity", "0.2"),
        ("learned.safetensors", "another run", "plan.json"),
    ),
    "select-damaged-config": (lambda p: _select(_damaged_config(p), "--sparsity", "0.2"), ("config.yaml", "not YAML")),
    **{
        f"select-{sparsity}": (
            lambda p, sparsity=sparsity: _select(_learned(p), "--sparsity", sparsity, "--nested"),
            (f"sparsity {sparsity}", "at 0.3 explores, 0.15 to 0.45"),
        )
        for sparsity in ("0.14", "0.46")
    },
    **{
        f"select-{sparsity}": (
            lambda p, sparsity=sparsity: _select(_learned(p), "--sparsity", sparsity),
            ("sparsity must be a number between 0 and 1", f"got '{sparsity}'"),
        )
        for sparsity in ("0", "1", "30", "-0.3", "nan", "inf", "40%", "much")
    },
    "select-without-sparsity": (lambda p: _select(_learned(p)), ("--sparsity",)),
    "select-beyond-minimums": (
        lambda p: _select(_learned(p, "budget.min_channels=5"), "--sparsity", "0.45"),
        ("minimums", "0.45", "lower the minimums or the sparsity (a kv group of layer 0 always stays)"),
    ),
    # the choice and the stop rule
    "selection-all": (lambda p: p.prune("search.selection=1"), ("search.selection", "0.9", "1")),
    "regret-0": (lambda p: p.prune("search.regret=0"), ("search.regret", "greater than 0", "0")),
    "final-windows-0": (lambda p: p.prune("search.final_windows=0"), ("search.final_windows", "2", "0")),
    "sequences-automatic": (lambda p: p.prune("search.sequences=automatic"), ("search.sequences", "'automatic'")),
    "auto-of-reinforce": (
        lambda p: p.prune(*REINFORCE, "search.sequences=auto"),
        ("search.sequences 'auto'", "'posterior'", "not 'reinforce'"),
    ),
    "reinforce-with-regret": (
        lambda p: p.prune(*REINFORCE, "search.regret=0.1"),
        ("search.regret has no meaning for search.method 'reinforce'",),
    ),
    # the command line
    "command-unknown": (lambda p: ["prone"], ("prone",)),
    "option-unknown": (lambda p: ["prune", "--sparse", "0.5"], ("--sparse",)),
    "option-without-value": (lambda p: ["prune", "--model"], ("--model",)),
    "option-of-wrong-type": (lambda p: ["evaluate", str(p.model), "--window", "x"], ("--window", "integer")),
    "argument-missing": (lambda p: ["apply", "plan.json"], ("argument", "model")),
    "argument-too-many": (lambda p: ["resume", "a", "b"], ("b",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names what is wrong, exit code 2, and not a byte changed."""
    attempt, said = BAD[case]
    if case.startswith("cuda") and torch.cuda.device_count() > 0:
        pytest.skip("there are GPUs here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which other tests need
    arguments = attempt(place)
    before = place.contents()
    sentence = in_one_sentence(run(*arguments))
    assert [part for part in said if part not in sentence] == [], sentence
    assert place.contents() == before


GOOD: dict[str, Try] = {
    "shortest": lambda p: p.prune(),
    "smallest-sparsity": lambda p: [*p.prune(), "--sparsity", f"{1.01 - CEILING:g}"],
    "largest-window": lambda p: p.prune(f"data.window={POSITIONS}", f"initial.window={POSITIONS}"),
    "smallest-window": lambda p: p.prune("data.window=2", "search.chunk=1"),
    "one-chunk": lambda p: p.prune("search.chunk=16"),
    "one-step": lambda p: p.prune(f"search.sequences={PASSES}"),
    "one-round-of-a-batch": lambda p: p.prune(*METHODS["posterior-batch"], f"search.sequences={2 * UNREAD_PASSES}"),
    "one-matched-step": lambda p: p.prune(*REINFORCE, "search.sequences=8", "search.baseline=matched"),
    "fewest-masks": lambda p: p.prune("search.masks=2"),
    "one-window": lambda p: p.prune("search.windows=1"),
    "one-window-all-batch": lambda p: p.prune(*METHODS["posterior-batch"], "search.windows=1"),
    "as-many-rounds-as-steps": lambda p: p.prune(*METHODS["posterior-batch"], "search.rounds=24"),
    "without-baseline": lambda p: p.prune(*REINFORCE, "search.masks=1", "search.baseline=none"),
    "floor-and-ceiling-of-reinforce": lambda p: p.prune(*REINFORCE, "policy.floor=0", "policy.ceiling=1"),
    "reinforce-in-chunks": lambda p: p.prune("preset=reinforce", "search.masks_per=chunk"),
    "minimums-just-possible": lambda p: p.prune("budget.min_channels=11"),
    "empty-out-folder": lambda p: p.prune(out=p.folder / "temporary"),
    "relative-paths": lambda p: p.prune(model=Path("model"), text=Path("text.txt"), out=Path("a/b")),
    "granularity-in-words": lambda p: p.prune("granularity='channel, kv_group'"),
    "fewest-final-windows": lambda p: p.prune("search.selection=0.9", "search.final_windows=2"),
    "many-scores": lambda p: p.prune("initial.also=[flap, magnitude, random]"),
    "plans-just-explored": lambda p: p.prune("plans.sparsities=[0.15, 0.45]"),
    "plans-with-a-comma": lambda p: p.prune("plans.sparsities=0.2,0.4"),
    "off-where-it-means-nothing": lambda p: p.prune(
        "search.chunk=null", "search.by_activity=false", "search.masks_per=batch"
    ),
    "select-lowest": lambda p: _select(_learned(p), "--sparsity", "0.15"),
    "select-highest-nested": lambda p: _select(_learned(p), "--sparsity", "0.45", "--nested"),
    "dotted-config": lambda p: ["prune", str(p.file("c.yaml", "search.masks: 4\nsearch.windows: 4")), *p.prune()[1:]],
    "empty-config": lambda p: ["prune", str(p.file("c.yaml", "# nothing")), *p.prune()[1:]],
}


@pytest.mark.parametrize("case", GOOD)
def test_its_valid_neighbour(case: str, place: Place) -> None:
    """What lies just on the right side of a limit runs, without a word on stderr."""
    assert succeed(*GOOD[case](place)).err == ""
    assert not list((place.folder / "temporary").glob("bernprune*"))


def test_debug_shows_the_traceback(place: Place) -> None:
    """With --debug the same mistake has its traceback, and the sentence as its last line."""
    done = run(*place.prune("search.masks=many"), "--debug")
    assert done.code == 2 and "Traceback" in done.err and "ConfigError" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not place.out.exists()


def test_a_fault_of_ours_keeps_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user cannot mend is not dressed up as his mistake."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(pipeline, "set_stage", fail)
    with pytest.raises(ZeroDivisionError):
        run(*place.prune())
