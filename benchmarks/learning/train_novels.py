"""Train the model of the task ``novels``: a Llama of about 40 million parameters, on a GPU.

    python benchmarks/learning/train_novels.py                    # benchmarks/learning/novels

It reads English novels, and stories and web pages for variety, from ``../shared/data`` beside the checkout; what is
held out are other novels. Writes bf16 safetensors, the tokenizer and a model card with the figures reached into a
folder that git ignores.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.task import SHARED, SOURCES
from benchmarks.training import arguments_of, make
from bernprune.errors import BernpruneError
from bernprune.text import load_documents

OTHERS = ("data/tinystories/train.jsonl", "data/c4-sample/c4-sample.jsonl")

CARD = """# The model of the task `novels`

A Llama to measure pruning on, by `benchmarks/learning/train_novels.py`: 12 layers, hidden size 512,
byte-level BPE tokens, tied embeddings; Muon for matrices, AdamW for the rest, bf16 autocast. The loss is that of the
stored weights over disjoint windows of novels that it was not trained on.

| | |
| --- | --- |
{rows}
"""


def novels(path: str) -> list[str]:
    """Those of a file, in which a blank line ends a novel."""
    (text,) = load_documents(path, split="train")
    return [novel for novel in text.split("\n\n") if novel.strip()]


def main() -> None:
    """Train and write it."""
    source = SOURCES["novels"]
    args = arguments_of(
        str(__doc__),
        out=Path(source.model),
        steps=1000,
        batch=256,
        micro_batch=64,
        vocab_size=8192,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    texts = novels(source.text)
    for name in OTHERS:
        texts += load_documents(str(SHARED / name), split="train")
    make(
        texts,
        novels(source.held_out),
        args,
        CARD,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
