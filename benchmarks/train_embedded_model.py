"""Train the embedded test model: a small Llama on the docstrings of its own dependencies.

    python benchmarks/train_embedded_model.py --steps 3000 --out bernprune/embedded/model

Writes bf16 safetensors, the tokenizer and a model card with the figures reached. Two CPU cores take about an
hour; glibc's allocator spends half of that returning memory unless told to keep it:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 python benchmarks/train_embedded_model.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training import arguments_of, make
from bernprune.embedded.prose import documents

CARD = """# The embedded test model

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
    """Train and write it."""
    args = arguments_of(
        str(__doc__), out=Path("bernprune/embedded/model"), steps=3000, batch=32, micro_batch=8, vocab_size=2048
    )
    make(
        documents("train"),
        documents("held-out"),
        args,
        CARD,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation="eager",
    )


if __name__ == "__main__":
    main()
