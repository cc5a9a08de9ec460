"""A basis of exported heads in which a quantised cache loses less; in full precision nothing changes.

A cache of few bits rounds blocks of channels by the largest number in each, so that its noise is about as strong in
quiet channels as in loud ones, and grows with all that is cached, tr(A Σ Aᴴ), Σ = E[x xᴴ] of what is cached. What reads
it weighs the noise by A⁻ᴴ M A⁻¹: M is E[q qᴴ] of the queries for keys, and W_Oᵀ W_O for values. The product of the two
traces is smallest, (tr (Σ^½ M Σ^½)^½)², where both matrices are the same, as in a balanced realisation of a linear
system. An orthogonal map behind that gives every channel the same share, and leaves both traces as they are.

For values any A is allowed. For keys it is one that commutes with RoPE: any complex matrix among the components of one
rotary frequency, which for a single component is the scale (E|q|² / E|k|²)^¼ (METHOD, section 10).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

import numpy as np
import torch
from scipy.fft import dct
from scipy.linalg import dft, hadamard
from tqdm.auto import tqdm

from mea_compress.architectures import Checkpoint
from mea_compress.errors import RequestError
from mea_compress.exporting.fold import HeadBasis, changed_projections, unchanged_projections
from mea_compress.exporting.form import StockForm
from mea_compress.heads.alignment import sqrt_and_inverse_sqrt
from mea_compress.heads.composed import Array, split_heads
from mea_compress.layers.runner import LayerRunner, batches, embed
from mea_compress.loading import check_ids, load_model, load_tokenizer
from mea_compress.modeling.section_mea import rotary_pairs
from mea_compress.text.reading import TextChoice, read_documents
from mea_compress.text.sampling import sample_sequences
from mea_compress.text.sequences import token_sequences

# Sequences that are looked at, and how long they are at most: what is found are fourth roots of their means.
_SEQUENCES, _LENGTH = 8, 256
# What is below this share of the largest is taken for it, so that a channel that never speaks is not blown up.
_FLOOR = 1e-8


def balancing_tokens(source: Checkpoint, text: TextChoice | None, progress: bool = True) -> torch.Tensor:
    """Return the sequences that balancing looks at, (N, T), int64.

    Args:
        source: The compressed checkpoint.
        text: What `read_documents` takes; None samples from the checkpoint, which is then in memory as a whole.
        progress: Show a bar on stderr.

    Raises:
        RequestError: There is no such text or too little of it, or the checkpoint has no tokenizer to read it with.
    """
    directory, length = source.reader.directory, min(_LENGTH, source.config.max_position_embeddings)
    if text is None:
        tokenizer = None
        with suppress(RequestError):
            tokenizer = load_tokenizer(directory)
        return sample_sequences(load_model(directory), tokenizer, _SEQUENCES, length, progress=progress)
    tokens = token_sequences(read_documents(text), load_tokenizer(directory), length, limit=_SEQUENCES)
    check_ids(tokens, source.config.vocab_size, directory)
    return tokens


def balanced_bases(source: Checkpoint, form: StockForm, tokens: torch.Tensor, progress: bool = True) -> list[HeadBasis]:
    """Return the basis of every layer's exported heads in which keys, queries, values and o_proj are balanced.

    One layer is in memory at a time.

    Args:
        source: The compressed checkpoint.
        form: Of its export.
        tokens: Sequences that means are taken over, (N, T), int64.
        progress: Show a bar on stderr.
    """
    layers = range(source.config.num_hidden_layers)
    moments = tqdm(
        _input_moments(source, tokens), total=len(layers), desc="balancing", unit="layer", disable=not progress
    )
    return [layer_basis(source, form, layer, moment) for layer, moment in zip(layers, moments, strict=True)]


def layer_basis(source: Checkpoint, form: StockForm, layer: int, moment: Array) -> HeadBasis:
    """Return the basis of a layer's exported heads in which both sides are balanced.

    Args:
        source: The compressed checkpoint.
        form: Of its export.
        layer: Its index.
        moment: E[x xᵀ] of the attention's input with a 1 for biases behind it, (D + 1, D + 1), float64.
    """
    read = unchanged_projections(source, layer) | changed_projections(source, form, layer)
    width, heads = form.head_dim, form.heads(layer)
    queries = split_heads(read["q_proj"](), width).reshape(heads, -1, width, len(moment))
    keys, values = (split_heads(read[name](), width) for name in ("k_proj", "v_proj"))
    output = read["o_proj"]()
    output = output.reshape(len(output), heads, -1, width)  # (D, heads, group, width)
    metric = np.einsum("xhgi,xhgj->hij", output, output, optimize=True)
    if source.config.mea["qk_norm"]:  # the norm between projection and cache does not let a basis through
        key = np.broadcast_to(np.eye(width), (heads, width, width))
    else:
        pairs = exported_pairs(source, form)
        key = np.stack([_key_map(keys[head], queries[head], moment, form, pairs) for head in range(heads)])
    spread = _hadamard(width)
    value = np.stack([spread @ balancing(values[i] @ moment @ values[i].T, metric[i]) for i in range(heads)])
    return HeadBasis(key, value)


def balancing(covariance: Array, metric: Array) -> Array:
    """Return A that makes A Σ Aᴴ and A⁻ᴴ M A⁻¹ the same diagonal matrix.

    Args:
        covariance: Σ of what is cached, (n, n), Hermitian.
        metric: M of what reads it, likewise.
    """
    root, inverse = sqrt_and_inverse_sqrt(covariance, _FLOOR)
    values, vectors = np.linalg.eigh(root @ metric @ root)
    largest = values[-1]
    scale = np.maximum(values, _FLOOR * largest if largest > 0 else 1.0) ** 0.25
    return (scale[:, None] * vectors.conj().T) @ inverse


def exported_pairs(source: Checkpoint, form: StockForm) -> tuple[list[int], list[int]]:
    """Return the two channels of every rotary pair of an exported head."""
    return rotary_pairs(form.head_dim, source.rotary_dim if form.keeps_rope else form.head_dim)


def _key_map(keys: Array, queries: Array, moment: Array, form: StockForm, pairs: tuple[list[int], list[int]]) -> Array:
    """Return the map of a head's keys, (width, width): a complex matrix for each rotary frequency.

    Args:
        keys: (width, D + 1).
        queries: Of the heads that read them, (group, width, D + 1).
        moment: As `layer_basis`.
        form: Of the export.
        pairs: Of its channels.
    """
    first, second = (np.array(channels) for channels in pairs)
    cached, asking = keys[first] + 1j * keys[second], queries[:, first] + 1j * queries[:, second]
    result = np.zeros((form.head_dim, form.head_dim))
    for _, members in groupby(range(len(first)), key=lambda pair: form.source_pairs[pair]):
        places = list(members)
        covariance = cached[places] @ moment @ cached[places].conj().T
        metric = (asking[:, places] @ moment @ asking[:, places].conj().mT).sum(0)
        mixed = _fourier(len(places)) @ balancing(covariance, metric)
        one, other = first[places], second[places]
        result[np.ix_(one, one)] = result[np.ix_(other, other)] = mixed.real
        result[np.ix_(one, other)], result[np.ix_(other, one)] = -mixed.imag, mixed.imag
    return result


@torch.no_grad()
def _input_moments(source: Checkpoint, tokens: torch.Tensor) -> Iterator[Array]:
    """Yield E[x xᵀ] of every attention's input with a 1 behind it, (D + 1, D + 1), float64."""
    config, hidden = source.config, embed(source, tokens)
    for layer in range(config.num_hidden_layers):
        runner = LayerRunner(source, layer)
        moment = torch.zeros(config.hidden_size + 1, config.hidden_size + 1, dtype=torch.float64)
        for part in batches(len(tokens), 1):
            following, captured = runner.run(hidden[part])
            hidden[part] = following
            inputs = captured.inputs.flatten(0, 1)
            inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
            moment += (inputs.T @ inputs).double()
        yield (moment / tokens.numel()).numpy()


def _hadamard(size: int) -> Array:
    """Return an orthogonal matrix whose entries are about as large everywhere, (size, size).

    Signs of its rows are random: engines that rotate too (llama.cpp, by the same matrix) would undo it otherwise.
    """
    power = size & -size
    cosines = dct(np.eye(size // power), axis=0, norm="ortho")  # which any size has
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size)
    return signs[:, None] * np.kron(cosines, hadamard(power) / np.sqrt(power))


def _fourier(size: int) -> Array:
    """Return a unitary matrix all of whose entries are equally large, with random phases of its rows: (size, size)."""
    phases = np.exp(2j * np.pi * np.random.default_rng(0).random(size))
    return phases[:, None] * dft(size, scale="sqrtn")


__all__ = ["balanced_bases", "balancing", "balancing_tokens", "exported_pairs", "layer_basis"]
