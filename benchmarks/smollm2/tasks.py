"""Zero-shot tasks by lm-evaluation-harness: the dense model, and what runs that were kept made of it.

pip install "lm_eval==0.4.13" ".[test]"
python benchmarks/smollm2/run.py --sequences 0,4096 --runs out/smollm2
python benchmarks/smollm2/tasks.py --runs out/smollm2        # what is missing, and tasks.md
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rows import Row, append_row, commit, key_of, list_of, read_rows
from benchmarks.learning.task import SHARED
from benchmarks.smollm2 import run
from bernprune.backends import find_device
from bernprune.errors import BernpruneError
from bernprune.evaluation.latency import machine
from bernprune.storage import write_bytes

HERE, DATA = Path(__file__).parent, SHARED / "data/zeroshot"
KEY = ("model", "task")
LIMIT = 500  # questions of a task, the first ones

_CHOICE: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
# Prompts as in the tasks of the same name that the harness brings; measured is what papers report.
TASKS: dict[str, dict[str, Any]] = {
    "piqa": {**_CHOICE, "doc_to_text": "{{query}}Answer:", "metric": "acc_norm"},
    "arc_easy": {**_CHOICE, "doc_to_text": "{{query}}\nAnswer:", "metric": "acc_norm"},
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric": "acc",
    },
}


def ask(folder: Path, name: str) -> dict[str, Any]:
    """What a model folder answers to the first questions of a task, loaded as anybody would load it."""
    from lm_eval import simple_evaluate

    given = dict(TASKS[name])
    metric = given.pop("metric")
    task = {
        **given,
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(DATA / f"{name}.jsonl")}},
        "validation_split": "validation",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32"},
        tasks=[task],
        limit=LIMIT,
        batch_size=8,
        device=str(find_device("auto")),
        bootstrap_iters=0,
    )
    figures = found["results"][name]
    return {"metric": metric, "value": figures[f"{metric},none"], "questions": found["n-samples"][name]["effective"]}


def measure(folder: Path, key: Row) -> Row:
    """A row: the answers, and with what they were got."""
    return {
        **key,
        **ask(folder, key["task"]),
        "lm_eval": version("lm_eval"),
        "machine": machine(find_device("auto")),
        "commit": commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """One line a model."""
    lines = [
        "# Zero-shot tasks",
        "",
        f"Share of the first {LIMIT} questions of each that are answered right; `tasks.py` makes this.",
        "",
        f"| model | {' | '.join(TASKS)} |",
        f"| --- |{' ---: |' * len(TASKS)}",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["task"]: row for row in rows if row["model"] == model}
        cells = [_cell(found[task]) if task in found else "" for task in TASKS]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: Row) -> str:
    """A share with the standard error of its questions."""
    share, questions = row["value"], row["questions"]
    return f"{share:.1%} ± {(share * (1 - share) / (questions - 1)) ** 0.5:.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=list_of(str, TASKS), default=list(TASKS))
    parser.add_argument("--runs", type=Path, help="where run.py kept folders of runs; without, the dense model alone")
    parser.add_argument("--folder", type=Path, default=HERE, help="where tasks.jsonl and tasks.md lie")
    given = parser.parse_args(arguments)
    run.check_files()
    results = given.folder / "tasks.jsonl"
    models = {"dense": run.MODEL}
    for row in read_rows(given.folder / "results.jsonl", run.KEY):
        name = f"{row['sparsity']:.0%} removed, {row['sequences']:,} sequences, seed {row['seed']}"
        folder = run.run_folder(given.runs, row) / "model" if given.runs else None
        if folder is not None and folder.is_dir():
            models[name] = folder
        else:
            print(f"{name}: left out, as no folder of the run was kept", file=sys.stderr)
    for model, folder in models.items():
        for task in given.task:
            key = {"model": model, "task": task}
            if not any(key_of(row, KEY) == key_of(key, KEY) for row in read_rows(results, KEY)):
                append_row(results, measure(folder, key))
    write_bytes(given.folder / "tasks.md", table(read_rows(results, KEY)).encode())


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
