"""A pruned model as a GGUF file, which llama.cpp and what is built on it load.

llama.cpp's own ``llama`` expects layers of one size. Two of its architectures know layers of their own: ``deci`` (lists
of heads, key/value heads and FFN widths, layers without attention, biases everywhere) takes Llama, Mistral and Qwen2,
``openelm`` (one fused projection for q, k and v, and norms of q and k) takes Qwen3 with tied embeddings. ``deci`` turns
neighbouring rows of q and k into each other where transformers turns the halves of a head, so these are reordered.

Letters: D hidden size, H heads, E head size.
"""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bernprune.errors import ModelError, RunError
from bernprune.export.vocabulary import Vocabulary
from bernprune.models.architecture import part
from bernprune.models.families import attention_window, family_of
from bernprune.units import LayerShape

DTYPES = ("auto", "float32", "float16", "bfloat16")
_PREFIX = "bernprune_"  # of the model type of what slicing makes
_ARCHITECTURES = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
_FUSED = ("q_proj", "k_proj", "v_proj")
_STATIC = ("default", "linear", "llama3")  # rotary embeddings that no length of text changes


def write_gguf(model: Any, vocabulary: Vocabulary, path: Path, *, dtype: str = "auto") -> str:
    """Write the model to the file ``path``, and return the name of llama.cpp's architecture.

    Args:
        dtype: number format of the matrices, by default the model's; vectors are in float32.

    Raises:
        ModelError: a model that bernprune has not sliced, or that llama.cpp cannot run, with the reason.
        RunError: the package gguf is not installed.
    """
    gguf = import_gguf()
    architecture = architecture_for(model)
    if len(vocabulary.tokens) > model.config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(vocabulary.tokens)} tokens, but the model embeds {model.config.vocab_size}"
        )
    kind = _kind(gguf, str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype)
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        _add_sizes(writer, model)
        vocabulary.add_to(writer, gguf, model.config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind.name != "F32" else "ALL_F32"])
        for name, tensor in _tensors(gguf, model, architecture):
            of = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
            size = tensor.numel() * gguf.GGML_QUANT_SIZES[of][1]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(gguf, model, architecture):  # one at a time: together they may not fit into memory
            writer.write_tensor_data(_encoded(gguf, name, tensor, kind))
    return architecture


def _encoded(gguf: Any, name: str, tensor: torch.Tensor, kind: Any) -> Any:
    """A weight as it stands in the file. Raises ``ModelError`` for one that float16 cannot hold."""
    values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    if tensor.ndim == 1:
        return values
    if kind.name == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"weight {name} holds numbers that float16 cannot; use --dtype bfloat16 or float32")
    return gguf.quants.quantize(values, kind)


def import_gguf() -> Any:
    """The package gguf. Raises ``RunError`` where it is missing."""
    try:
        import gguf
    except ImportError:
        raise RunError('a GGUF file is written by the package gguf; install it: pip install ".[gguf]"') from None
    return gguf


def architecture_for(model: Any) -> str:
    """The architecture of llama.cpp that runs the model.

    Raises:
        ModelError: there is none.
    """
    config, rope = model.config, _rope_type(model.config)
    if not config.model_type.startswith(_PREFIX):
        raise ModelError(
            f"a {config.model_type} model with layers of one size was not sliced by bernprune; llama.cpp's own "
            "convert_hf_to_gguf.py takes it"
        )
    family, shapes = config.model_type.removeprefix(_PREFIX), _shapes(model)
    architecture = _ARCHITECTURES[family]
    faults = [
        (config.hidden_act != "silu", f"its activation is {config.hidden_act!r}, and only 'silu' is known"),
        (rope not in _STATIC, f"its rotary embedding is {rope!r}, and only {', '.join(_STATIC)} are known"),
        (any(shape.kv_groups and not shape.channels for shape in shapes), "a layer has attention but no FFN"),
    ]
    if architecture == "openelm":
        biased = any(name.endswith(".bias") for name, _ in model.named_parameters())
        faults += [
            (not config.tie_word_embeddings, "openelm ties the output to the input embedding, and the model does not"),
            (any(not shape.kv_groups for shape in shapes), "openelm knows no layers without attention"),
            (biased, "openelm knows no biases"),
            (rope != "default", "openelm knows no scaled rotary embedding"),
        ]
    for found, fault in faults:
        if found:
            raise ModelError(f"llama.cpp cannot run this {family} model: {fault}")
    return architecture


def _shapes(model: Any) -> list[LayerShape]:
    """Sizes of the layers; no heads where one has no attention, no channels where it has no FFN."""
    shapes, head_dim = [], model.config.head_dim
    for layer in part(model, "model", "layers"):
        rows = [getattr(getattr(layer.self_attn, name, None), "out_features", 0) for name in ("q_proj", "k_proj")]
        channels = getattr(getattr(layer.mlp, "up_proj", None), "out_features", 0)
        shapes.append(LayerShape(rows[0] // head_dim, rows[1] // head_dim, channels))
    return shapes


def _rope_type(config: Any) -> str:
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def context_length(config: Any) -> int:
    """As many tokens as llama.cpp runs as the model does, layers of which may attend to a window of so many alone."""
    family = family_of(config.model_type.removeprefix(_PREFIX))
    windows = [attention_window(family, config, index) for index in range(config.num_hidden_layers)]
    if family.windowed == "none":  # its attention heeds no window, but caches do
        windows.append(getattr(config, "sliding_window", None))
    return min([int(config.max_position_embeddings), *filter(None, windows)])


def _add_sizes(writer: Any, model: Any) -> None:
    config, shapes = model.config, _shapes(model)
    writer.add_name((config.bernprune or {}).get("base_model") or "pruned")
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(shapes))
    writer.add_feed_forward_length([shape.channels for shape in shapes])
    writer.add_head_count([shape.query_heads for shape in shapes])
    writer.add_head_count_kv([shape.kv_groups for shape in shapes])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _kind(gguf: Any, dtype: str) -> Any:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if dtype not in names:
        raise ModelError(f"matrices of a GGUF file can be {', '.join(names)}, but not {dtype}")
    return gguf.GGMLQuantizationType[names[dtype]]


def _tensors(gguf: Any, model: Any, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by the names that llama.cpp knows, and how much slower rotary frequencies turn, if any does."""
    head_dim, layers = model.config.head_dim, part(model, "model", "layers")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(layers))
    done = {"lm_head"} if model.get_output_embeddings().weight is model.get_input_embeddings().weight else set()
    if architecture == "openelm":
        done |= set(_FUSED)
        for index, layer in enumerate(layers):
            parts = [getattr(layer.self_attn, name).weight for name in _FUSED]
            yield f"blk.{index}.attn_qkv.weight", torch.cat(parts)
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        role = owner.rpartition(".")[2]
        if role in done:
            continue
        found = known.get_name(owner)
        assert found is not None, f"llama.cpp has no place for {name}"
        turned = architecture == "deci" and role in ("q_proj", "k_proj")
        yield f"{found}.{leaf}", neighbouring(tensor, head_dim) if turned else tensor
    slower_E = slower_frequencies(model)
    if not torch.allclose(slower_E, torch.ones_like(slower_E)):
        yield "rope_freqs.weight", slower_E


def neighbouring(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of heads whose rotary pairs are half a head apart, reordered so that they are neighbours, ``[H E, ...]``."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def slower_frequencies(model: Any) -> torch.Tensor:
    """What rotary frequencies without scaling are divided by to give the model's, ``[E / 2]``."""
    config = model.config
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain_E = torch.exp(-math.log(config.rope_parameters["rope_theta"]) * steps)
    return (plain_E / part(model, "model", "rotary_emb").inv_freq.double().cpu()).float()
