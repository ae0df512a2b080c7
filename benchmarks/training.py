"""Train a small Llama from nothing: what the scripts that make models to be pruned have in common."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import perplexity

END = "<|endoftext|>"


def arguments_of(description: str, **defaults: Any) -> argparse.Namespace:
    """What can be chosen on the command line; ``defaults`` are those of the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="windows a step")
    parser.add_argument("--micro-batch", type=int, help="windows a forward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.set_defaults(**defaults)
    return parser.parse_args()


def make(texts: Sequence[str], held_out: Sequence[str], args: argparse.Namespace, card: str, **shape: Any) -> None:
    """Train a Llama of this shape and save it; ``card`` is its model card but for the ``rows`` of its table."""
    tokenizer = train_tokenizer(texts, args.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    figures = train(model, pack(tokenizer, texts), pack(tokenizer, held_out), args)
    save(model, tokenizer, card.format(rows=table_of(figures)), args.out)
    print(json.dumps(figures, indent=2))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
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


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """One stream of token ids, every document opened by the end-of-text token."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in (tokenizer.eos_token_id, *document)])


def train(
    model: LlamaForCausalLM, stream_N: torch.Tensor, held_out_N: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """On windows from random places of the stream. The model is left in bf16; returns what was reached."""
    model.to(args.device)
    optimizers, compiled = _optimizers(model, args), torch.compile(model)
    print(
        f"{len(stream_N):,} tokens; {len(held_out_N):,} tokens held out; {model.num_parameters():,} parameters",
        flush=True,
    )
    generator = torch.Generator().manual_seed(args.seed)
    started, bar = time.monotonic(), tqdm(range(args.steps), mininterval=30)
    for step in bar:
        starts_B = torch.randint(len(stream_N) - args.window, (args.batch,), generator=generator)
        tokens_BT = stream_N[starts_B[:, None] + torch.arange(args.window + 1)].to(args.device)
        loss = _accumulate(compiled, tokens_BT, args.micro_batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * _schedule(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 500 == 0:
            tqdm.write(
                f"step {step + 1}: {_loss_over(model, held_out_N[:100_000], args.window):.4f} nats per token held out"
            )
    seconds = time.monotonic() - started
    loss = _loss_over(model.to(torch.bfloat16), held_out_N, args.window)
    return {
        "parameters": model.num_parameters(),
        "train_tokens": len(stream_N),
        "tokens_seen": args.steps * args.batch * args.window,
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_perplexity": round(perplexity(loss), 2),
        "held_out_tokens": len(held_out_N) // args.window * (args.window - 1),
        "window": args.window,
        "steps": args.steps,
        "seed": args.seed,
        "minutes": round(seconds / 60, 1),
        "machine": machine(args.device),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    """Weights, tokenizer and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def table_of(figures: dict[str, Any]) -> str:
    """For a model card."""
    return "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in figures.items())


def _optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms (Jordan, 2024)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int, steps: int) -> float:
    """Short warm-up, a plateau, and a linear fall to nothing over the second half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def _loss_on(model: torch.nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens_BT.device.type, dtype=torch.bfloat16):
        logits = model(tokens_BT[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def _accumulate(model: torch.nn.Module, tokens_BT: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """Add the gradient of the batch's mean loss, a few windows at a time; small batches stay in a processor's cache."""
    parts, total = tokens_BT.split(micro_batch), torch.zeros((), device=tokens_BT.device)
    for part in parts:
        loss = _loss_on(model, part) * (len(part) / len(tokens_BT))
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def _loss_over(model: LlamaForCausalLM, stream_N: torch.Tensor, window: int) -> float:
    """Mean nats per token over disjoint windows."""
    windows_WT = stream_N[: len(stream_N) // window * window].view(-1, window).to(model.device)
    model.eval()
    losses = [_loss_on(model, chunk).item() * len(chunk) for chunk in windows_WT.split(32)]
    model.train()
    return sum(losses) / len(windows_WT)
