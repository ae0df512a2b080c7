"""Train the embedded test model: a small Llama on the docstrings of its own dependencies.

    python benchmarks/train_embedded_model.py --steps 3000 --out bernprune/embedded/model

Writes bf16 safetensors, the tokenizer and a model card with the figures reached. Two CPU cores take about an
hour; glibc's allocator spends half of that returning memory unless told to keep it:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 python benchmarks/train_embedded_model.py
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bernprune.embedded.prose import documents

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding; the end-of-text token separates documents and opens a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, every document opened by the end-of-text token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in (tokenizer.eos_token_id, *document)])


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms (Jordan, 2024)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Short warm-up, a plateau, and a linear fall to nothing over the second half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def loss_on(model: LlamaForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens_BT[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def accumulate(model: LlamaForCausalLM, tokens_BT: torch.Tensor, micro_batch: int) -> float:
    """Add the gradient of the batch's mean loss, a few windows at a time; small batches stay in the cache."""
    parts = tokens_BT.split(micro_batch)
    total = 0.0
    for part in parts:
        loss = loss_on(model, part) / len(parts)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, window: int) -> tuple[float, int]:
    """Mean nats per token over disjoint windows, and the number of tokens predicted."""
    windows = stream[: len(stream) // window * window].view(-1, window)
    model.eval()
    losses = [loss_on(model, chunk).item() * len(chunk) for chunk in windows.split(32)]
    model.train()
    return sum(losses) / len(windows), len(windows) * (window - 1)


def train(args: argparse.Namespace) -> None:
    texts = documents("train")
    tokenizer = train_tokenizer(texts, args.vocab_size)
    stream, held_out = pack(tokenizer, texts), pack(tokenizer, documents("held-out"))
    model = build_model(args, tokenizer)
    optimizers, compiled = build_optimizers(model, args), torch.compile(model)
    print(
        f"{sum(map(len, texts)):,} characters, {len(stream):,} tokens; {len(held_out):,} tokens held out; "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )
    generator = torch.Generator().manual_seed(args.seed)
    started, bar = time.monotonic(), tqdm(range(args.steps), mininterval=30)
    for step in bar:
        starts = torch.randint(len(stream) - args.window, (args.batch,), generator=generator)
        tokens_BT = torch.stack([stream[i : i + args.window + 1] for i in starts.tolist()])
        loss = accumulate(compiled, tokens_BT, args.micro_batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % 500 == 0:
            loss, _ = held_out_loss(model, held_out[:100_000], args.window)
            tqdm.write(f"step {step + 1}: {loss:.4f} nats per token held out")
    seconds = time.monotonic() - started
    save(model, tokenizer, args, stream, held_out, seconds)


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    stream: torch.Tensor,
    held_out: torch.Tensor,
    seconds: float,
) -> None:
    model = model.to(torch.bfloat16)
    loss, tokens = held_out_loss(model, held_out, args.window)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    figures = {
        "parameters": model.num_parameters(),
        "train_tokens": len(stream),
        "tokens_seen": args.steps * args.batch * args.window,
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "held_out_tokens": tokens,
        "window": args.window,
        "steps": args.steps,
        "seed": args.seed,
        "minutes": round(seconds / 60, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    (args.out / "README.md").write_text(card(figures))
    print(json.dumps(figures, indent=2))


def card(figures: dict[str, Any]) -> str:
    """The model card: data, tokens, loss, licence."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in figures.items())
    return f"""# The embedded test model

A small Llama (8 layers, hidden size 192, 8 query heads in 4 kv groups, 512 FFN channels, 2,048 byte-level BPE tokens,
tied embeddings) to try bernprune on without a network. It is no use for anything else.

**Data.** The docstrings of Python's standard library, torch, transformers, numpy and datasets, and the topics of
Python's manual (`pydoc_data`), as installed on the training machine: English technical prose of at least 64 characters
a document, equal documents once. One document in 16, by a hash of its content, is held out. Near-duplicates, of which
docstrings are full, may stand on both sides, so the held-out loss flatters the model as a language model; it is meant
as a reference for pruning only.

**Training.** `benchmarks/train_embedded_model.py`: Muon for matrices, AdamW for the rest, bf16 autocast. Weights are
stored in bf16; the loss below is that of the stored weights, over disjoint windows.

| | |
| --- | --- |
{rows}

**Licence.** Apache-2.0, as bernprune.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bernprune/embedded/model"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows a forward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
