"""bernprune: structured pruning of transformer language models that learns what to remove, with forward passes only.

    import bernprune

    config = bernprune.make_config({"model": {"path": "folder"}, "data": {"text": "text.jsonl"}})
    report = bernprune.prune(config, Path("out"))

Importing it makes transformers' Auto classes load pruned folders without ``trust_remote_code``.
"""

from bernprune.config import RunConfig, make_config
from bernprune.errors import BernpruneError
from bernprune.evaluation.perplexity import evaluate
from bernprune.models.loading import load_model, load_tokenizer
from bernprune.models.modeling_bernprune import register
from bernprune.models.saving import save_pruned
from bernprune.models.slicing import slice_model
from bernprune.models.view import describe
from bernprune.objective import masked_objective
from bernprune.policy.baselines import make_baseline
from bernprune.policy.bernoulli import initial_probs
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import Limits, select
from bernprune.repair import Repairer
from bernprune.run.applying import apply_plan
from bernprune.run.comparing import compare_runs
from bernprune.run.exporting import export_gguf
from bernprune.run.loop import evaluate_step
from bernprune.run.pipeline import prune, resume
from bernprune.run.plans import read_plan, select_plan
from bernprune.run.recovering import recover
from bernprune.run.scoring import score_model
from bernprune.scores import SCORES, initial_scores
from bernprune.sections import ModelConfig
from bernprune.units import KeepPlan, UnitSpace

__version__ = "0.1.0"

__all__ = [
    "SCORES",
    "BernpruneError",
    "Budget",
    "Design",
    "KeepPlan",
    "Limits",
    "MaskSearch",
    "ModelConfig",
    "PosteriorSearch",
    "ReinforceSearch",
    "Repairer",
    "RunConfig",
    "UnitSpace",
    "apply_plan",
    "compare_runs",
    "describe",
    "evaluate",
    "evaluate_step",
    "export_gguf",
    "initial_probs",
    "initial_scores",
    "load_model",
    "load_tokenizer",
    "make_baseline",
    "make_config",
    "masked_objective",
    "prune",
    "read_plan",
    "recover",
    "resume",
    "save_pruned",
    "score_model",
    "select",
    "select_plan",
    "slice_model",
]

register()
