"""Pruned models in other formats than that of a Hugging Face folder."""
