"""Pruned folders in vLLM, where it is installed: a clean process loads them by its Transformers backend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SLIDING_LAYERS, Variant, random_plan, random_tokens, tiny_model
from tolerances import LOGITS, assert_close

from bernprune.models.architecture import architecture_of
from bernprune.models.saving import save_pruned
from bernprune.models.slicing import slice_model

VOCABULARY, LENGTH = 53, 23
# Heads of 32 are the smallest that vLLM attends with on a processor; Qwen2's have the hidden size in common.
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "head_dim": 32, "hidden_size": 192}
CASES = [
    Variant("llama", "llama", {"tie_word_embeddings": True}),
    Variant("llama-repaired", "llama"),
    Variant("mistral-window", "mistral"),
    Variant("qwen2", "qwen2"),
    Variant("qwen3-sliding_biases", "qwen3", {**SLIDING_LAYERS, "attention_bias": True}),
]
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

folder, answers, tokens, vocabulary = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = LLM(
    folder, trust_remote_code=True, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
    max_num_seqs=2, max_logprobs=vocabulary, enable_prefix_caching=False, gpu_memory_utilization=0.1,
)
asked = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=vocabulary, ignore_eos=True, detokenize=False)
(outcome,) = model.generate([{"prompt_token_ids": tokens}], asked)
logs = [[found[token].logprob for token in range(vocabulary)] for found in outcome.prompt_logprobs[1:]]
with open(answers, "w") as file:
    json.dump({"logs": logs, "next": list(outcome.outputs[0].token_ids)}, file)
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("variant", CASES, ids=str)
def test_vllm_runs_it_as_we_do(variant: Variant, tmp_path: Path) -> None:
    """Every layer with heads and channels of its own, one without an FFN, biases of the family or of a repair."""
    model = tiny_model(variant.family, torch.float32, **{**SIZES, **variant.changes})
    if variant.name == "llama-repaired":
        for layer in model.model.layers:
            layer.mlp.down_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 192))
            layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.linspace(2, -1, 192))
    plan = random_plan(architecture_of(model), 5, without_ffn=(2,))
    pruned = slice_model(model, plan)
    folder, answers = save_pruned(pruned, None, tmp_path / "out", plan=plan), tmp_path / "answers.json"

    tokens = random_tokens(1, LENGTH)
    given = [str(folder), str(answers), json.dumps(tokens[0].tolist()), str(VOCABULARY)]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", IN_VLLM, *given], env=os.environ | quiet, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]

    found = json.loads(answers.read_text())
    with torch.no_grad():
        logs_TV = pruned(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        chosen = pruned.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, LENGTH:]
    assert_close(torch.tensor(found["logs"]), logs_TV, LOGITS[torch.float32])
    assert found["next"] == chosen.tolist()
