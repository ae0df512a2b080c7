"""What every installation holds: a small trained Llama and the prose it was trained on."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"

# What a user writes, as a model or as a text, to mean the embedded one.
EMBEDDED = "embedded"
