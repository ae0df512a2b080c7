"""The scripts that train models to be pruned: what they learn, and what they leave behind."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import training
from benchmarks.learning import task, train_novels
from benchmarks.learning.task import Source
from bernprune.errors import DataError

TEXT = "One fine day the cat sat on the mat and thought of nothing.\nThen it rained.\n"


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation needs a compiler, and most of a minute."""
    monkeypatch.setattr(torch, "compile", lambda model: model)


def small(**others: int) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**(others | sizes | {"num_key_value_heads": 1, "tie_word_embeddings": True}))


def test_it_learns_and_counts_what_it_did() -> None:
    tokenizer = training.train_tokenizer([TEXT], vocab_size=270)
    stream_N = training.pack(tokenizer, [TEXT] * 9)
    assert (stream_N == tokenizer.eos_token_id).sum() == 9
    torch.manual_seed(0)
    model = LlamaForCausalLM(small(vocab_size=len(tokenizer)))
    args = argparse.Namespace(
        steps=80, batch=5, micro_batch=2, window=23, muon_lr=0.05, adam_lr=0.02, seed=0, device=torch.device("cpu")
    )
    figures = training.train(model, stream_N, stream_N, args)
    shares = stream_N.bincount() / len(stream_N)
    alone = torch.special.entr(shares).sum()  # the least loss of who knows how often tokens come, and no more
    assert figures["held_out_loss_nats_per_token"] < 0.8 * alone
    assert figures["tokens_seen"] == 80 * 5 * 23 and figures["held_out_tokens"] == len(stream_N) // 23 * 22
    assert model.dtype == torch.bfloat16


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    """Those of unequal sizes, too."""
    torch.manual_seed(0)
    model, tokens_BT = LlamaForCausalLM(small(vocab_size=32)), torch.randint(32, (5, 9))
    gradients = []
    for size in (5, 2):
        model.zero_grad()
        training._accumulate(model, tokens_BT, size)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


def test_novels_become_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("train", 40), ("valid", 20)):
        (tmp_path / f"{name}.txt").write_text(f"{TEXT * count}\n{name}: {TEXT * count}")
    (tmp_path / "others.jsonl").write_text(json.dumps({"text": TEXT}))
    source = Source(str(tmp_path / "model"), str(tmp_path / "train.txt"), str(tmp_path / "valid.txt"))
    monkeypatch.setitem(task.SOURCES, "novels", source)
    monkeypatch.setattr(train_novels, "SHARED", tmp_path)
    monkeypatch.setattr(train_novels, "OTHERS", ("others.jsonl",))
    monkeypatch.setattr(training, "LlamaConfig", lambda **given: small(vocab_size=given["vocab_size"]))
    assert len(train_novels.novels(source.text)) == 2
    sizes = ["--steps=3", "--batch=2", "--micro-batch=2", "--window=16", "--vocab-size=262", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["train_novels.py", *sizes])
    train_novels.main()
    model, tokenizer = (kind.from_pretrained(source.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16 and len(tokenizer) == 262 == model.config.vocab_size
    card = (tmp_path / "model" / "README.md").read_text()
    trained, held_out = (int(found) for found in re.findall(r"\| (?:train|held out) tokens \| (\d+) \|", card))
    assert 0.4 * trained < held_out < 0.6 * trained  # of the shorter text
    assert "| tokens seen | 96 |" in (tmp_path / "model" / "README.md").read_text()
    monkeypatch.setattr(train_novels, "OTHERS", ("none.jsonl",))
    with pytest.raises(DataError, match="does not exist"):
        train_novels.main()
