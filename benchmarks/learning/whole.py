"""A run as it ships, by the public road, for benchmarks of what comes out in the end."""

from pathlib import Path

from benchmarks.learning.rows import Row
from benchmarks.learning.task import REPORT_TOKENS, Settings, Source, learning_text
from bernprune.settings import merge

DEVELOPMENT, HELD_OUT = "development", "held-out"


def run_settings(source: Source, scratch: Path, *, sparsity: float, seed: int, held_out: bool) -> Settings:
    """Of a run on the learning text that reports on development or on held-out text, and times next to nothing."""
    given: Settings = {
        "model": {"path": source.model},
        "data": {"text": learning_text(source, scratch), "eval_tokens": REPORT_TOKENS},
        "budget": {"sparsity": sparsity},
        "report": {"initial_latency": False, "latency_repeats": 2, "latency_rows": 1},
        "seed": seed,
    }
    if held_out:
        given = merge(given, {"data": {"eval_text": source.held_out}})
    return merge(given, source.config)


def named(protocol: Row, *, held_out: bool) -> Row:
    """A report's protocol with the name of the text in the place of its path, which tells of one machine alone."""
    return {**protocol, "text": HELD_OUT if held_out else DEVELOPMENT}
