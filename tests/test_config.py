"""Configuration: what may be said, what it means, and that names, presets and example files agree."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from tiny_run import REPOSITORY, Place, run, visit

import bernprune
from bernprune import names
from bernprune.config import COMPARING, METHOD_SETTINGS, PRESETS, RunConfig, make_config
from bernprune.errors import ConfigError
from bernprune.manual import manual
from bernprune.policy.baselines import BASELINES, make_baseline
from bernprune.run import stage
from bernprune.run.folder import RunFolder
from bernprune.scores import SCORES
from bernprune.settings import merge, parse_settings, read_yaml
from bernprune.units import KINDS

EXAMPLES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted key, sections too."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
    return found


def value_at(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


# --- presets and their order ---


def test_the_default_preset_changes_nothing() -> None:
    """Without a word, every setting is its field's default, and what follows from others is settled."""
    assert make_config({}) == RunConfig() and RunConfig().search.refit is True
    assert make_config({}).preset == "default" and PRESETS["default"] == {}


REINFORCE = {
    "initial.map": "sigmap",
    "policy.floor": 0.01,
    "policy.ceiling": 0.99,
    "policy.projection": "cost-weighted",
    "search.method": "reinforce",
    "search.masks_per": "batch",
    "search.masks": 16,
    "search.windows": 1,
    "search.learning_rate": 0.1,
    "search.baseline": "leave-one-out",
    "search.scaling": "natural",
    "search.sampling": "independent",
}
PAPER = {
    "search.method": "reinforce",
    "search.masks_per": "batch",
    "budget.pools": "separate",
    "initial.score": "wanda-sp",
    "initial.map": "sigmap",
    "policy.floor": 0.0,
    "policy.ceiling": 1.0,
    "policy.projection": "published",
    "search.masks": 2,
    "search.windows": 8,
    "search.learning_rate": 0.002,
    "search.baseline": "published",
    "search.baseline_window": 5,
    "search.scaling": "sqrt-fisher",
    "search.epsilon": 1e-7,
    "search.sampling": "independent",
    "search.selection": 0.0,
    "search.non_finite": "drop",
    "initial.allocation": "uniform",
    "initial.inputs": "pruned",
    "budget.min_kv_groups": 0,
    "budget.min_channels": 0,
}


def test_the_paper_preset_is_the_published_setting() -> None:
    """2 masks on 8 windows of 128, rate 0.002, moving average over 5, separate budgets (Gao et al., 2024)."""
    config = make_config({"preset": "paper"})
    assert {key: value_at(config, key) for key in PAPER} == PAPER
    assert config.data.window == 128 and set(config.granularity) == {"kv_group", "channel"}


def test_the_reinforce_preset_is_plain_policy_gradients() -> None:
    """16 masks of a whole batch, which is one window, against each other, rate 0.1."""
    config = make_config({"preset": "reinforce"})
    assert {key: value_at(config, key) for key in REINFORCE} == REINFORCE


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_wins_over_a_preset(preset: str) -> None:
    """A preset is defaults: one setting given leaves its neighbours in the same section alone."""
    alone, given = make_config({"preset": preset}), make_config({"preset": preset, "search": {"windows": 5}})
    assert given.search.windows == 5 != alone.search.windows
    changed = given.to_dict()
    changed["search"]["windows"] = alone.search.windows
    assert changed == alone.to_dict()


def test_the_order_of_what_is_given(prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset gives way to the file, the file to flags, flags to --set, and a --set to a later one."""
    place = visit(prepared, tmp_path / "place", monkeypatch)
    seen: list[RunConfig] = []

    def stop(config: RunConfig, *_: Any, **__: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("bernprune.run.pipeline.prune", stop)
    file = place.file(
        "run.yaml",
        "preset: paper\nseed: 3\nbudget: {sparsity: 0.2}\nsearch: {masks: 4, learning_rate: 0.1, windows: 2}\n"
        "data: {text: text.txt}\n",
    )
    flags = ["--sparsity", "0.4", "--seed", "5", "--model", "model", "--score", "flap"]
    run("prune", str(file), *flags, "--set", "seed=7", "--set", "search.windows=3", "--set", "search.windows=6")
    config = seen[0]
    assert config.search.baseline == "published", "from the preset"
    assert (config.search.masks, config.search.learning_rate) == (4, 0.1), "from the file, over the preset"
    assert (config.budget.sparsity, config.initial.score) == (0.4, "flap"), "from flags, over the file"
    assert (config.seed, config.search.windows) == (7, 6), "from --set, over flags and the file"
    assert (config.model.path, config.data.text) == (str(place.model), str(place.text)), "made absolute"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rows", "{here}/rows"),
        ("rows:en", "{here}/rows:en"),
        ("rows::test", "{here}/rows::test"),
        ("{here}/rows:en:test", "{here}/rows:en:test"),
        ("co:lon", "{here}/co:lon"),
        ("allenai/c4:en:train", "allenai/c4:en:train"),
        ("embedded", "embedded"),
    ],
)
def test_local_texts_are_made_absolute(
    given: str, expected: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also folders of which a configuration and a split are named, so that a run can be resumed from anywhere."""
    seen: list[RunConfig] = []
    monkeypatch.setattr("bernprune.run.pipeline.prune", lambda config, *_, **__: seen.append(config) or 1 / 0)
    for name in ("rows", "co:lon"):
        (place.folder / name).mkdir()
    given, expected = (text.format(here=place.folder) for text in (given, expected))
    with pytest.raises(ZeroDivisionError):
        run("prune", "--text", given, "--eval-text", given)
    assert (seen[0].data.text, seen[0].data.eval_text) == (expected, expected)


def test_what_a_merge_key_brings_is_not_given_twice(tmp_path: Path) -> None:
    """Also where a mapping is used before its own turn to be read has come; what is written beside it counts."""
    path = tmp_path / "a.yaml"
    path.write_text("b: &B {window: 64, seed: 1}\nbase: {inner: &A {<<: *B, window: 1}}\ndata: {<<: *A}\n")
    assert read_yaml(path)["data"] == {"window": 1, "seed": 1}
    path.write_text("b: &B {window: 64}\ndata: {<<: *B, window: 1, window: 2}\n")
    with pytest.raises(ConfigError, match="'window' is given twice"):
        read_yaml(path)


def test_merge_changes_neither_side() -> None:
    """Nested sections are merged, other values replaced, in a new mapping."""
    base, over = {"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2], "c": 4}
    assert merge(base, over) == {"a": {"x": 1, "y": 3}, "b": [2], "c": 4}
    assert base == {"a": {"x": 1, "y": 2}, "b": [1]} and over == {"a": {"y": 3}, "b": [2], "c": 4}


# --- what is said of settings ---


def test_the_manual_tells_of_every_setting() -> None:
    """Its default, as YAML takes it, and what its field says."""
    told, config = " ".join(manual().split()), RunConfig()
    for key, field in fields(RunConfig).items():
        default = value_at(config, key)
        if not isinstance(default, BaseModel):
            (line,) = [line for line in manual().splitlines() if line.startswith(f"{key} = ")]
            written = re.sub(r" \([^)]*\)$", "", line.partition(" = ")[2])
            assert value_at(make_config(parse_settings([f"{key}={written}"])), key) == value_at(make_config({}), key)
            assert default in (value_at(make_config({}), key), None)
            assert f"{line} {' '.join(field.description.split())}" in told
    assert f"initial.score = wanda-sp ({', '.join(SCORES)})" in told


def test_help_gives_defaults_and_choices() -> None:
    """Of what many will set, as the models have it."""
    told, config = " ".join(run("prune", "--help").out.split()), RunConfig()
    assert f"a function of yours as FILE.py:NAME; by default {config.initial.score}" in told
    assert f"remove; by default {config.budget.sparsity:g}" in told and f"windows; by default {config.seed}" in told
    assert run("settings").out == f"{manual()}\n" and run("--version").out == f"{bernprune.__version__}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": {"path": "other"}}, True),
        ({"model": {"path": "other"}, "data": {"window": 64}}, True),
        ({"model": {"path": "other"}, "data": {"text": "embedded"}}, False),
        ({"model": {"path": "other"}, "data": {"text": "text.txt"}}, False),
        ({}, False),
    ],
)
def test_a_text_that_nobody_chose_is_said(
    given: Any, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded text is the embedded model's; of another it keeps what nobody may want."""
    monkeypatch.setattr(stage, "_tokens", lambda *_, **__: torch.arange(100))
    stage.read_texts(make_config(given), None, 100)
    assert ("no calibration text was given" in caplog.text) == said


# --- single settings ---

SAID = [
    ("search.discount=1e-3", "search.discount", 1e-3),
    ("search.chunk=null", "search.chunk", None),
    ("search.sequences=null", "search.sequences", None),
    ("granularity=channel", "granularity", ("channel",)),
    ("granularity=[layer, channel]", "granularity", ("layer", "channel")),
    ("granularity=layer, channel", "granularity", ("layer", "channel")),
    ("plans.sparsities=0.2,0.4", "plans.sparsities", (0.2, 0.4)),
    ("plans.sparsities=0.4", "plans.sparsities", (0.4,)),
    ("repair.ridges=[1, 2]", "repair.ridges", (1.0, 2.0)),
    ("initial.also=flap, magnitude", "initial.also", ("flap", "magnitude")),
    ("model.path=a=b", "model.path", "a=b"),
    ("data.eval_text=x.txt", "data.eval_text", "x.txt"),
    ("report.initial_latency=false", "report.initial_latency", False),
]


@pytest.mark.parametrize(("setting", "key", "value"), SAID, ids=[setting for setting, _, _ in SAID])
def test_a_setting_is_read_as_yaml(setting: str, key: str, value: Any) -> None:
    """Numbers, null, lists, names and truth values come out as what they are."""
    assert value_at(make_config(parse_settings([setting])), key) == value


def test_white_space_is_not_nothing() -> None:
    """A shell gives rows to be joined by blank lines as they are; an empty value is null, as in YAML."""
    assert parse_settings(["data.eval_join=\n\n", "data.eval_text="]) == {
        "data": {"eval_join": "\n\n", "eval_text": None}
    }


MEANT = [
    ("budget.sparsty", "budget.sparsity"),
    ("sparsity", "budget.sparsity"),
    ("search.lerning_rate", "search.learning_rate"),
    ("learning_rate", "search.learning_rate"),
    ("search.mask", "search.masks"),
    ("serach", "search"),
    ("granularty", "granularity"),
    ("policy.celing", "policy.ceiling"),
    ("model.window", "data.window"),
    ("plans.sparsity", "plans.sparsities"),
    ("recover.lr", "recover.learning_rate"),
    ("budget.kv", "budget.also_kv_cache"),
    ("recovr", "recover"),
    ("recover.qqq", "recover.rows"),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=[given for given, _ in MEANT])
def test_the_nearest_key_is_suggested(given: str, meant: str) -> None:
    """A slip is answered with what was probably meant, a like one of its section, or the same of another, first.
    A name in short is, too; what should be in a section is not answered by one."""
    with pytest.raises(ConfigError) as caught:
        make_config(parse_settings([f"{given}=1"]))
    assert str(caught.value) == f"setting {given!r} is unknown; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("given", "ending"),
    [("initial.score=flapp", " as FILE.py:NAME"), ("initial.also=[flapp]", ", but got ['flapp']")],
)
def test_a_value_is_said_once(given: str, ending: str) -> None:
    """Where the message names it already; of several, it says which."""
    with pytest.raises(ConfigError, match=r"score 'flapp' is unknown; did you mean 'flap'\? known are ") as caught:
        make_config(parse_settings([given]))
    assert str(caught.value).endswith(ending)


NUMBERS = [key for key, field in fields(RunConfig).items() if field.annotation in (int, float)]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_neither_truth_nor_text(key: str) -> None:
    """YAML's ``yes`` is not 1, and a word is no number; the message names the key and what was given."""
    for given, shown in (("yes", "True"), ("many", "'many'"), (".nan", "nan")):
        with pytest.raises(ConfigError, match=rf"setting '{key}': .*, but got {shown}"):
            make_config(parse_settings([f"{key}={given}"]))


def test_there_are_numbers() -> None:
    """The test above looks at the settings it is meant for."""
    assert {"budget.sparsity", "search.masks", "seed", "data.window"} <= set(NUMBERS)


# --- what belongs together ---

OTHER_VALUES = {
    "regret": 0.2,
    "rounds": 7,
    "forgetting": 0.25,
    "swing": 0.25,
    "by_activity": False,
    "look_windows": 5,
    "learning_rate": 0.5,
    "baseline": "none",
    "baseline_window": 3,
    "scaling": "raw",
    "epsilon": 1e-7,
    "reference": "dense",
    "pull": 0.5,
}


NEEDED: dict[str, dict[str, Any]] = {
    "look_windows": {"refit": False},
    "reference": {"baseline": "matched"},
    "baseline_window": {"baseline": "moving-average"},
    "epsilon": {"scaling": "sqrt-fisher"},
}


# What says that there is to be none of it.
OFF = {"forgetting": 0.0, "swing": 0.0, "epsilon": 0.0, "pull": 0.0}


@pytest.mark.parametrize("name", OTHER_VALUES)
@pytest.mark.parametrize("preset", ["default", "reinforce"])
def test_a_setting_without_meaning_is_refused(preset: str, name: str) -> None:
    """What only one method knows is no setting of the other, unless it changes nothing or asks for nothing."""
    method, given = make_config({"preset": preset}).search.method, {name: OTHER_VALUES[name]}
    if name in METHOD_SETTINGS[method] or not OTHER_VALUES[name]:
        taken = make_config({"preset": preset, "search": given | NEEDED.get(name, {})}).search
        assert getattr(taken, name) == OTHER_VALUES[name]
        return
    with pytest.raises(ConfigError) as caught:
        make_config({"preset": preset, "search": given})
    assert str(caught.value) == f"search.{name} has no meaning for search.method {method!r}"
    if name in OFF:
        make_config({"preset": preset, "search": {name: OFF[name]}})
    default = getattr(RunConfig().search, name)
    assert make_config({"preset": preset, "search": {name: default}}) == make_config({"preset": preset})


@pytest.mark.parametrize("given", [{"initial": {"score": "wandasp"}}, {"repair": {"method": "rigde"}}])
def test_what_was_meant_is_asked_once(given: dict[str, Any]) -> None:
    """And it is not what was given."""
    with pytest.raises(ConfigError) as caught:
        make_config(given)
    assert re.findall("did you mean '(.*?)'", str(caught.value)) in (["wanda-sp"], ["ridge"])


def test_baselines_that_compare_masks_are_known() -> None:
    """One mask a step is refused for them, and for no other."""
    for name in get_args(names.BaselineName):
        search = {"baseline": name, "masks": 1}
        if name in COMPARING:
            with pytest.raises(ConfigError, match=f"'{name}' needs 2 masks or more, but search.masks is 1"):
                make_config({"preset": "reinforce", "search": search})
            with pytest.raises(ConfigError, match="at least 2 masks"):
                make_baseline(name, window=5, num_masks=1)
        else:
            assert make_config({"preset": "reinforce", "search": search}).search.masks == 1
            make_baseline(name, window=5, num_masks=1)


def test_every_setting_of_a_method_is_known() -> None:
    """The test above tries all of them, none belongs to both of ours, and those that say so in their sentence are
    theirs."""
    assert METHOD_SETTINGS.keys() == {*get_args(names.MethodName), names.CUSTOM}
    ours = [name for method in get_args(names.MethodName) for name in METHOD_SETTINGS[method]]
    assert sorted(ours) == sorted(OTHER_VALUES) and set(METHOD_SETTINGS[names.CUSTOM]) <= set(ours)
    words = {names.CUSTOM: "custom methods"}
    for method, settings in METHOD_SETTINGS.items():
        described = {
            name
            for name, field in type(RunConfig().search).model_fields.items()
            if words.get(method, method) in (field.description or "").partition(":")[0].split(", and ")
        }
        assert described == set(settings)


UNFIT = {
    "chunk-does-not-divide": {"search": {"chunk": 5}, "data": {"window": 16}},
    "chunk-of-a-sequence": {"search": {"chunk": 4, "masks_per": "sequence"}, "data": {"window": 16}},
    "chunk-of-a-batch": {"preset": "reinforce", "search": {"chunk": 4}, "data": {"window": 16}},
    "one-mask": {"search": {"masks": 1}},
    "floor-0": {"policy": {"floor": 0.0}},
    "ceiling-1": {"policy": {"ceiling": 1.0}},
    "published-projection": {"policy": {"projection": "published"}},
    "antithetic-without-others": {"search": {"method": "reinforce", "baseline": "matched"}},
    "antithetic-dropped-singly": {"search": {"masks_per": "batch", "non_finite": "drop"}},
    "antithetic-one-window-dropped": {"search": {"windows": 1, "non_finite": "drop"}},
    "exact-nested": {"granularity": ["layer", "channel"], "search": {"sampling": "exact"}},
    "reference-of-nothing": {"preset": "reinforce", "search": {"reference": "dense"}},
    "memory-of-nothing": {"preset": "reinforce", "search": {"baseline_window": 3}},
    "no-root": {"preset": "reinforce", "search": {"epsilon": 1e-7}},
    "no-levels": {"initial": {"map": "sigmap", "sharpness": 0.9}},
    "no-choice": {"search": {"selection": 0, "final_windows": 64}},
    "no-looks": {"search": {"selection": 0, "look_windows": 4}},
    "no-search": {"search": {"sequences": 0, "seconds": 60}},
    "no-regression": {"preset": "reinforce", "initial": {"also": ["flap"]}},
    "pull-from-floor-0": {"preset": "reinforce", "search": {"pull": 0.1}, "policy": {"floor": 0.0}},
    "pull-from-ceiling-1": {"preset": "reinforce", "search": {"pull": 0.1}, "policy": {"ceiling": 1.0}},
}
CHUNK_OF = "search.chunk 4 needs search.masks_per 'chunk', but that is {!r}"
BOUNDS = (
    "search.method 'posterior' needs policy.floor above 0, policy.ceiling below 1 and policy.projection 'cost-weighted'"
)
DROPPED = (
    "search.sampling 'antithetic' needs all masks on the same text, and so search.non_finite 'error' for "
    "search.masks_per 'batch' or search.windows 1; to drop single ones take 'independent' or 'exact'"
)
SAYING = {
    "chunk-does-not-divide": "search.chunk 5 must divide data.window, which is 16",
    "chunk-of-a-sequence": CHUNK_OF.format("sequence"),
    "chunk-of-a-batch": CHUNK_OF.format("batch"),
    "one-mask": "search.method 'posterior' needs search.masks of 2 or more, but got 1",
    "floor-0": BOUNDS,
    "ceiling-1": BOUNDS,
    "published-projection": BOUNDS,
    "antithetic-without-others": (
        "search.sampling 'antithetic' needs search.baseline 'leave-one-out', not 'matched'; with that take "
        "'independent' or 'exact'"
    ),
    "antithetic-dropped-singly": DROPPED,
    "antithetic-one-window-dropped": DROPPED,
    "exact-nested": (
        "search.sampling 'exact' needs units that do not lie in one another, but granularity is layer, channel"
    ),
    "reference-of-nothing": "search.reference has no meaning for search.baseline 'leave-one-out'",
    "memory-of-nothing": "search.baseline_window has no meaning for search.baseline 'leave-one-out'",
    "no-root": "search.epsilon has no meaning for search.scaling 'natural'",
    "no-levels": "initial.sharpness has no meaning for initial.map 'sigmap'",
    "no-choice": "search.final_windows has no meaning for search.selection 0",
    "no-looks": "search.look_windows has no meaning for search.selection 0",
    "no-search": "search.seconds has no meaning for search.sequences 0",
    "no-regression": "initial.also has no meaning for search.method 'reinforce'",
    "pull-from-floor-0": "search.pull needs policy.floor above 0 and policy.ceiling below 1",
    "pull-from-ceiling-1": "search.pull needs policy.floor above 0 and policy.ceiling below 1",
}


def test_each_item_of_a_list_is_judged_by_itself() -> None:
    """The sentence about the first that is wrong says nothing of what is wrong with another."""
    with pytest.raises(ConfigError) as caught:
        make_config({"plans": {"sparsities": [0, "much"]}})
    assert str(caught.value) == "setting 'plans.sparsities': input should be greater than 0, but got 0"


@pytest.mark.parametrize("case", UNFIT)
def test_settings_that_contradict_are_refused(case: str) -> None:
    """With all of those that are concerned."""
    with pytest.raises(ConfigError) as caught:
        make_config(UNFIT[case])
    assert str(caught.value) == SAYING[case]


FIT: dict[str, dict[str, Any]] = {
    "chunk-divides": {"search": {"chunk": 4}, "data": {"window": 16}},
    "chunk-is-the-window": {"search": {"chunk": 16}, "data": {"window": 16}},
    "chunk-longer-than-by-default": {"search": {"chunk": 64}},
    "reinforce-in-chunks": {
        "preset": "reinforce",
        "search": {"chunk": 4, "masks_per": "chunk"},
        "data": {"window": 16},
    },
    "two-masks": {"search": {"masks": 2}},
    "one-mask-of-reinforce": {"preset": "reinforce", "search": {"masks": 1, "baseline": "none"}},
    "bounds-of-reinforce": {"preset": "reinforce", "policy": {"floor": 0.0, "ceiling": 1.0, "projection": "published"}},
    "antithetic-policy-gradients": {"search": {"method": "reinforce"}},
    "antithetic-groups-dropped": {"search": {"non_finite": "drop"}},
    "independent-dropped-singly": {
        "search": {"masks_per": "batch", "non_finite": "drop", "sampling": "independent"},
    },
    "exact-flat": {"granularity": ["attention", "ffn"], "search": {"sampling": "exact"}},
    "matched-with-the-dense-model": {"preset": "reinforce", "search": {"baseline": "matched", "reference": "dense"}},
    "pulled": {"preset": "reinforce", "search": {"pull": 0.1}, "policy": {"floor": 1e-6, "ceiling": 1 - 1e-6}},
    "bounds-nearly-open": {"policy": {"floor": 1e-6, "ceiling": 1 - 1e-6}},
}


@pytest.mark.parametrize("case", FIT)
def test_their_valid_neighbours(case: str) -> None:
    """What lies just on the right side, or belongs to the other method."""
    config = make_config(FIT[case])
    assert make_config(config.to_dict()) == config


@pytest.mark.parametrize("window", [2, 16, 31, 32, 33, 34, 37, 64, 100, 128, 1022, 1024])
def test_a_chunk_is_the_largest_that_fits(window: int) -> None:
    """From 8 to 32 tokens, without a rest, or else the whole window; or what is given."""
    chunk = make_config({"data": {"window": window}}).chunk_tokens
    usual = [size for size in range(8, 33) if window % size == 0]
    assert chunk == (usual[-1] if usual else window)
    assert make_config({"data": {"window": window}, "search": {"chunk": window}}).chunk_tokens == window


# --- storing ---

VARIED: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "reinforce": {
        "preset": "reinforce",
        "search": {
            "epsilon": 1e-7,
            "scaling": "sqrt-fisher",
            "baseline": "matched",
            "reference": "mean-field",
            "pull": 1,
        },
    },
    "posterior": {"search": {"rounds": 5, "forgetting": 0.0, "discount": 1, "chunk": 2}},
    "everything": {
        "granularity": ["layer", "channel"],
        "search": {"seconds": 12.5, "sequences": 99, "objective": "kl", "checkpoint_steps": 3},
        "data": {"text": "a b.txt", "eval_text": "größe: [.jsonl", "eval_join": "a\x85b"},
        "model": {"path": "~/x", "revision": "1e5", "dtype": "bfloat16"},
    },
}


@pytest.mark.parametrize("case", VARIED)
def test_a_config_survives_its_file(case: str, tmp_path: Path) -> None:
    """to_dict names every setting, and what a run folder stores reads back to an equal config."""
    config = make_config(VARIED[case])
    assert make_config(config.to_dict()) == config
    folder = RunFolder(tmp_path)
    folder.start(config)
    assert read_yaml(folder.config) == config.to_dict() and folder.read_config() == config
    flat = parse_settings([f"{key}=1" for key, field in fields(RunConfig).items() if not _is_section(field)])
    assert _keys(config.to_dict()) == _keys(flat)


def _is_section(field: Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _keys(data: dict[str, Any], prefix: str = "") -> set[str]:
    inner = (
        _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key} for key, value in data.items()
    )
    return set().union(*inner)


def test_a_config_cannot_be_changed() -> None:
    """A run is determined by what was checked."""
    config = make_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.search.masks = 3


# --- names and descriptions ---


@pytest.mark.parametrize("key", fields(RunConfig))
def test_every_setting_is_described(key: str) -> None:
    """Each has a sentence under it."""
    field = fields(RunConfig)[key]
    assert field.description and field.description.endswith("."), key


def test_names_agree_with_what_they_name() -> None:
    """What the configuration allows is what there is, and the other way round."""
    assert set(get_args(names.BaselineName)) == BASELINES.keys()
    assert set(get_args(names.ScoreName)) == SCORES.keys()
    assert set(get_args(names.PresetName)) == PRESETS.keys()
    assert set(get_args(names.Kind)) == set(KINDS)


# --- the example files ---


def test_there_are_example_files() -> None:
    """Without any, the test below would pass by having nothing to look at."""
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_file_loads(path: Path) -> None:
    """Every file in configs/ is a configuration that says something."""
    config = make_config(read_yaml(path))
    assert config != RunConfig() or path.stem == "quickstart"
    assert make_config(config.to_dict()) == config


def test_examples_are_read() -> None:
    """Only files that the test above finds are in configs/."""
    assert [path.name for path in (REPOSITORY / "configs").iterdir() if path.suffix != ".yaml"] == []


def test_keys_may_be_dotted() -> None:
    """As in a file, and beside the sections that they lie in."""
    config = make_config({"search.masks": 4, "search": {"windows": 3}, "budget.sparsity": 0.4})
    assert (config.search.masks, config.search.windows, config.budget.sparsity) == (4, 3, 0.4)
    with pytest.raises(ConfigError, match=r"'search\.maks' is unknown; did you mean 'search\.masks'"):
        make_config({"search.maks": 4})
