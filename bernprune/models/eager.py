"""Attention that shows its probabilities, for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from bernprune.models.view import ModelView


@contextmanager
def eager_attention(view: ModelView) -> Iterator[None]:
    """Attention modules hand on what they computed and, second, their probabilities ``[R, H, T, T]``."""
    config = view.model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
