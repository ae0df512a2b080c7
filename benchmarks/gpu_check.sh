#!/usr/bin/env bash
# For a person with a GPU: every kernel against its twin on the card, then whole steps timed; prints a table.
set -euo pipefail
cd "$(dirname "$0")/.."

python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu_check.sh needs a CUDA device, and torch sees none")'
python -m pytest -m gpu
# Layers of a real width against float64, for which the whole model would be too large; their times are not kept.
python benchmarks/speed/run.py --device cuda --model llama2-7b --layers 2 --checked llama2-7b --folder "$(mktemp -d)" \
    --provider ours ours-triton --density 0.5 --tokens 16384 --per batch sequence chunk --seconds 0.1
python benchmarks/speed/run.py --device cuda --model llama2-7b --checked \
    --provider published batched ours ours-triton --tokens 16384 --per batch sequence chunk --seconds 10 "$@"
python benchmarks/speed/steps.py --device cuda --model llama2-7b --seconds 60
python benchmarks/speed/show.py
cat benchmarks/speed/table.md
