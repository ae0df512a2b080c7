"""The commands: what they are given, and what of it reaches the package."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from bernprune import __version__
from bernprune.cli.terminal import AtWork, quiet_libraries, show
from bernprune.config import RunConfig, make_config
from bernprune.embedded import EMBEDDED
from bernprune.errors import ConfigError
from bernprune.evaluation import perplexity
from bernprune.export.gguf import DTYPES as GGUF_DTYPES
from bernprune.manual import manual
from bernprune.names import RepairName
from bernprune.report import applied, compared, evaluated, exported, recovered, selected, table
from bernprune.run import applying, pipeline, recovering
from bernprune.run.comparing import compare_runs
from bernprune.run.exporting import export_gguf
from bernprune.run.folder import FREE_SETTINGS, RunFolder
from bernprune.run.forecast import forecast
from bernprune.run.plans import read_plan, select_plan
from bernprune.run.recovering import RECOVERY_SETTINGS, RecoveryFolder
from bernprune.run.score_tables import metrics_table, scores_table
from bernprune.run.scoring import score_model
from bernprune.scores import SCORES
from bernprune.scores.files import SUFFIX
from bernprune.settings import absolute, merge, parse_settings, read_yaml, without_none
from bernprune.units import KINDS

app = typer.Typer(
    help="Prune transformer language models structurally, with forward passes only.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DEFAULT_OUT, DEFAULTS = "out", RunConfig()


def _show_version(asked: bool) -> None:
    if asked:
        show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


Config = Annotated[Path | None, typer.Argument(help="YAML file with settings; see configs/.", show_default=False)]
Granularity = Annotated[
    str | None,
    typer.Option(
        help=f"What may be removed, comma-separated: {', '.join(KINDS)}; by default {','.join(DEFAULTS.granularity)}."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Any setting, e.g. search.masks=8; see bernprune settings."),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Say what is done even without a terminal, and show the traceback of errors."),
]  # seen to by run_app
SetOfModel = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="MODEL.B=C", help="A setting of the model, and no other, e.g. model.dtype=float32."),
]


def _settings_of(config: Path | None) -> dict[str, Any]:
    """What a config file says, if there is one; a folder, of a model or a run, is an easy slip."""
    if config is not None and config.is_dir():
        raise ConfigError(
            f"config file {config} is a folder; a model is given by --model, and resume goes on with a run"
        )
    return {} if config is None else read_yaml(config)


@app.command()
def prune(
    config: Config = None,
    model: Annotated[
        str | None, typer.Option(help="Local folder, Hugging Face name, or 'embedded', which is the default.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .txt, .md or .jsonl file, an .xz of one, a dataset folder, or a Hugging Face "
            "dataset as name:config:split; by default the embedded text."
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="Held-out text; by default the last tenth of --text, or the held-out part of the embedded text."
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help=f"Share of block parameters (see budget.measure) to remove; by default {DEFAULTS.budget.sparsity:g}."
        ),
    ] = None,
    granularity: Granularity = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Metric that starts the policy, of those that bernprune scores lists, a .safetensors file of scores, "
            f"or a function of yours as FILE.py:NAME; by default {DEFAULTS.initial.score}."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Set of defaults: 'default', 'reinforce' (plain policy gradients) or 'paper' (published)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default out/MODEL-SPARSITY.")] = None,
    seed: Annotated[str | None, typer.Option(help=f"Seed of masks and windows; by default {DEFAULTS.seed}.")] = None,
    settings: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Learn what to remove, remove it, save and verify. Without arguments: the embedded model."""
    flags = {
        "model": {"path": model},
        "data": {"text": text, "eval_text": eval_text},
        "budget": {"sparsity": sparsity},
        "granularity": granularity,
        "initial": {"score": score},
        "preset": preset,
        "seed": seed,
    }
    given = merge(_settings_of(config), without_none(flags))
    checked = make_config(absolute(merge(given, parse_settings(settings or []))))
    name = Path(checked.model.path).name
    folder = out or Path(DEFAULT_OUT, f"{name}-{checked.budget.sparsity:g}")
    AtWork.folder = RunFolder(folder, overwrite=overwrite)
    quiet_libraries()
    report = pipeline.prune(checked, folder, overwrite=overwrite)
    show(f"{table(report)}\n\nresult       {folder / 'model'}")


@app.command()
def resume(
    out: Annotated[Path, typer.Argument(help="Run folder of an unfinished run.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help=f"What may change meanwhile: {', '.join(FREE_SETTINGS)}."),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="End the search after one more step or, if it is over, the final choice, and go on from there.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was killed or interrupted."""
    changes = parse_settings(settings or [], only=FREE_SETTINGS)
    AtWork.folder = RunFolder(out)
    quiet_libraries()
    report = pipeline.resume(out, changes=changes, finish=finish)
    show(f"{table(report)}\n\nresult       {out / 'model'}")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json of a run, or a file in its plans/.")],
    model: Annotated[str, typer.Argument(help="Local folder, Hugging Face name, or 'embedded'.")],
    out: Annotated[Path, typer.Argument(help="New folder for the pruned model.")],
    repair: Annotated[
        str, typer.Option(help=f"Repair without training, on --text: {', '.join(get_args(RepairName))}.")
    ] = "none",
    text: Annotated[
        str | None, typer.Option(help="Calibration text of the repair; by default the embedded one.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="A setting of the model, the data or the repair."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Slice any copy of a model by a plan, save and verify; repaired before that if asked."""
    flags = without_none({"model": {"path": model}, "repair": {"method": repair}, "data": {"text": text}})
    checked = make_config(merge(flags, parse_settings(settings or [], only=["model", "data", "repair"])))
    if checked.data.model_fields_set and checked.repair.method == "none":
        raise ConfigError("the text (--text, data) is that of a repair, but --repair is 'none'")
    quiet_libraries()
    done = applying.apply_plan(checked, read_plan(plan), out)
    show(f"{applied(done)}\nresult       {out}")


@app.command()
def recover(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished run.")],
    out: Annotated[Path, typer.Argument(help="Folder of the recovery.")],
    text: Annotated[str | None, typer.Option(help="Text to train on; by default the run's calibration text.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help=f"What may differ from the run: {', '.join(RECOVERY_SETTINGS)}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier recovery in the folder.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="End one that was interrupted, with the best state so far.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train what a run kept a little, by low-rank adapters that are merged; the same command goes on."""
    changes = merge(without_none({"data": {"text": text}}), parse_settings(settings or [], only=RECOVERY_SETTINGS))
    AtWork.folder = RecoveryFolder(out, overwrite=overwrite)
    quiet_libraries()
    report = recovering.recover(run, out, changes=changes, overwrite=overwrite, finish=finish)
    show(f"{recovered(report)}\n\nresult       {out / 'model'}")


@app.command()
def select(
    out: Annotated[Path, typer.Argument(help="Run folder.")],
    sparsity: Annotated[str, typer.Option(help="Share of the prunable cost to remove.")],
    nested: Annotated[bool, typer.Option("--nested", help="Contain, or be contained in, what the run keeps.")] = False,
    debug: Debug = False,
) -> None:
    """Make the plan for another sparsity from what a run has learned, without a new search."""
    path, kept = select_plan(out, sparsity, nested=nested)
    show(selected(kept))
    show(f"plan         {path}; cut a model by it with: bernprune apply {shlex.quote(str(path))} MODEL OUT")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Finished runs side by side: seeds of one configuration together, the first configuration against the others."""
    found = compare_runs(runs)
    show(json.dumps(found, indent=2, allow_nan=False) if as_json else compared(found))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder of a finished run or recovery, or of a pruned model.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write.")],
    dtype: Annotated[str, typer.Option(help=f"Number format of matrices: {', '.join(GGUF_DTYPES)}.")] = "auto",
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="Copy the vocabulary of this GGUF file of the dense model, not that of the tokenizer."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the tokenizer run code of its own, if it has any.")
    ] = False,
    debug: Debug = False,
) -> None:
    """A pruned model as a GGUF file, for llama.cpp and what builds on it (pip install ".[gguf]")."""
    quiet_libraries()
    report = export_gguf(model, out, dtype=dtype, vocabulary=vocabulary, trust_remote_code=trust_remote_code)
    show(exported(report))
    show(f"result       {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a dense or pruned model, Hugging Face name, or 'embedded'.")],
    text: Annotated[
        str, typer.Option(help="Text to evaluate on: a file, a dataset folder or name, or 'embedded'.")
    ] = EMBEDDED,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = DEFAULTS.data.window,
    tokens: Annotated[
        int, typer.Option(min=2, help="Cut the text to this many tokens, by default as a run does.")
    ] = DEFAULTS.data.eval_tokens,
    join: Annotated[
        str | None,
        typer.Option(
            help="Join the text's rows by this string, as data.eval_join does, in a shell $'\\n\\n' for blank lines; "
            "otherwise each is a text."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    settings: SetOfModel = None,
    debug: Debug = False,
) -> None:
    """Perplexity with its protocol. Windows and length are by default those of a run."""
    checked = make_config(merge({"model": {"path": model}}, parse_settings(settings or [], only=["model"])))
    quiet_libraries()
    result = perplexity.evaluate(checked.model, text, window=window, max_tokens=tokens, joined_by=join)
    show(json.dumps(result, indent=2, allow_nan=False) if as_json else evaluated(result))


@app.command()
def units(
    model: Annotated[
        str, typer.Argument(help="Local folder, Hugging Face name, 'embedded', or a YAML file with settings.")
    ] = EMBEDDED,
    granularity: Granularity = None,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """What can be removed from a model, what it costs, and what a run would take."""
    given = read_yaml(Path(model)) if Path(model).suffix in (".yaml", ".yml") else {"model": {"path": model}}
    flags = without_none({"granularity": granularity})
    checked = make_config(merge(merge(given, flags), parse_settings(settings or [])))
    quiet_libraries()
    show(forecast(checked))


@app.command()
def scores(
    model: Annotated[
        str | None,
        typer.Argument(help="Local folder, Hugging Face name, or 'embedded'; without one, the metrics are listed."),
    ] = None,
    score: Annotated[str | None, typer.Option(help=f"Metric; by default {DEFAULTS.initial.score}.")] = None,
    text: Annotated[str | None, typer.Option(help="Calibration text, as for prune.")] = None,
    granularity: Granularity = None,
    out: Annotated[Path | None, typer.Option(help="A .safetensors file to write, for prune --score.")] = None,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """List the metrics, or score the units of a model by one, as a run would."""
    flags = {"model": {"path": model}, "data": {"text": text}, "granularity": granularity, "initial": {"score": score}}
    given = merge(without_none(flags), parse_settings(settings or []))
    if model is None:
        if given or out is not None:
            raise ConfigError("bernprune scores without a model lists the metrics, and takes no options")
        show(metrics_table(SCORES.values()))
        return
    if out is not None and out.suffix != SUFFIX:
        raise ConfigError(f"the name of a file of scores must end in {SUFFIX}, but is {str(out)!r}")
    checked = make_config(absolute(given))
    quiet_libraries()
    show("\n".join([scores_table(score_model(checked, out)), *([] if out is None else [f"result       {out}"])]))


@app.command()
def settings() -> None:
    """Every setting, its default, and what it means."""
    show(manual())
