"""A GGUF file run in plain torch, as llama.cpp's architectures ``deci`` and ``openelm`` run it.

Everything is taken from the file: where llama.cpp is not installed, this is what its weights and figures are tested by.

Letters: T tokens, V vocabulary, D hidden size, H query heads, G key/value heads, E head size.
"""

from typing import Any

import gguf
import numpy as np
import torch
from torch.nn import functional as F


def run_gguf(reader: gguf.GGUFReader, tokens_T: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]``, in float32."""
    return _Model(reader).logits(tokens_T)


class _Model:
    def __init__(self, reader: gguf.GGUFReader) -> None:
        self.reader, self.architecture = reader, reader.fields["general.architecture"].contents()
        self.weights = {each.name: torch.from_numpy(np.array(each.data)) for each in reader.tensors}
        self.eps, self.head_dim = self.figure("attention.layer_norm_rms_epsilon"), self.figure("attention.key_length")

    def figure(self, name: str) -> Any:
        return self.reader.fields[f"{self.architecture}.{name}"].contents()

    def logits(self, tokens_T: torch.Tensor) -> torch.Tensor:
        hidden_TD = self.weights["token_embd.weight"][tokens_T]
        names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        sizes = list(zip(*(self.figure(name) for name in names), strict=True))
        assert len(sizes) == self.figure("block_count")
        for layer, (heads, kv_heads, width) in enumerate(sizes):
            if heads:
                hidden_TD = hidden_TD + self.attention(layer, heads, kv_heads, hidden_TD)
            if width:
                hidden_TD = hidden_TD + self.ffn(layer, hidden_TD)
        output = "output" if "output.weight" in self.weights else "token_embd"
        return self.linear(output, self.norm("output_norm", hidden_TD))

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(values, values.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return F.linear(values, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attention(self, layer: int, heads: int, kv_heads: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        at = f"blk.{layer}"
        normed_TD = self.norm(f"{at}.attn_norm", hidden_TD)
        if self.architecture == "openelm":
            fused_THE = self.linear(f"{at}.attn_qkv", normed_TD).unflatten(1, (-1, self.head_dim))
            query_THE, key_TGE, value_TGE = fused_THE.split([heads, kv_heads, kv_heads], dim=1)
            query_THE, key_TGE = self.norm(f"{at}.attn_q_norm", query_THE), self.norm(f"{at}.attn_k_norm", key_TGE)
        else:
            query_THE, key_TGE, value_TGE = (
                self.linear(f"{at}.attn_{name}", normed_TD).unflatten(1, (count, self.head_dim))
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
        query_HTE, key_GTE = (self.rotated(each).transpose(0, 1) for each in (query_THE, key_TGE))
        mixed_HTE = F.scaled_dot_product_attention(
            query_HTE,
            key_GTE.repeat_interleave(heads // kv_heads, dim=0),
            value_TGE.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0),
            is_causal=True,
        )
        return self.linear(f"{at}.attn_output", mixed_HTE.transpose(0, 1).flatten(1))

    def rotated(self, values_THE: torch.Tensor) -> torch.Tensor:
        """By position: in ``deci`` a number and its neighbour together, in ``openelm`` those half a head apart."""
        size = self.figure("rope.dimension_count")
        assert size == self.head_dim
        frequencies = self.figure("rope.freq_base") ** (-torch.arange(0, size, 2).double() / size)
        frequencies = frequencies / self.weights.get("rope_freqs.weight", torch.ones(1)).double()
        angles = torch.arange(len(values_THE))[:, None, None] * frequencies
        pairs = values_THE.unflatten(2, (-1, 2) if self.architecture == "deci" else (2, -1)).double()
        axis = -1 if self.architecture == "deci" else -2
        real, imaginary = pairs.unbind(axis)
        turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(real, imaginary)
        return torch.stack([turned.real, turned.imag], dim=axis).flatten(2).float()

    def ffn(self, layer: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        normed_TD, at = self.norm(f"blk.{layer}.ffn_norm", hidden_TD), f"blk.{layer}.ffn"
        return self.linear(
            f"{at}_down", F.silu(self.linear(f"{at}_gate", normed_TD)) * self.linear(f"{at}_up", normed_TD)
        )
