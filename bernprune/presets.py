"""What a preset says: defaults under all that is given."""

from typing import Any

# `reinforce` is the best that plain policy gradients did for us. `paper` is the published method (Gao et al., 2024,
# arXiv 2406.10576, released code); what it was run with, 240,000 sequences (15,000 steps of 2 masks on 8 windows) and
# scores from windows of 1,024 tokens, stands in configs/.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reinforce": {
        "initial": {"map": "sigmap"},
        "policy": {"floor": 0.01, "ceiling": 0.99},
        "search": {
            "method": "reinforce",
            "masks_per": "batch",
            "sampling": "independent",
            "masks": 16,
            "windows": 1,
            "refit": False,
        },
    },
    "paper": {
        "budget": {"pools": "separate", "min_kv_groups": 0, "min_channels": 0},
        "initial": {"score": "wanda-sp", "map": "sigmap", "allocation": "uniform", "inputs": "pruned"},
        "policy": {"floor": 0.0, "ceiling": 1.0, "projection": "published"},
        "search": {
            "method": "reinforce",
            "masks_per": "batch",
            "sampling": "independent",
            "learning_rate": 0.002,
            "masks": 2,
            "windows": 8,
            "baseline": "published",
            "baseline_window": 5,
            "scaling": "sqrt-fisher",
            "epsilon": 1e-7,
            "non_finite": "drop",
            "selection": 0.0,
        },
        "repair": {"method": "none"},
    },
}
