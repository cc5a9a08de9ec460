"""Head-level linear composition: every head is a linear combination of fewer component heads (arXiv 2601.19611)."""

import torch

from mea_compress.compositions.composed import Composed


def gram(heads: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """H × H inner products of heads: of their weights, or of their outputs on calibration text.

    Args:
        heads: (H, d, D + 1), float64.
        moment: E[x xᵀ] of the layer's input with a constant 1 appended, (D + 1, D + 1); None for the weights alone.

    Returns:
        G[g, h] = tr(W_g Σ W_hᵀ), (H, H).
    """
    seen = heads if moment is None else heads @ moment
    return torch.einsum("gdx,hdx->gh", seen, heads)


def compose(heads: torch.Tensor, components: int, moment: torch.Tensor | None = None) -> Composed:
    """The best `components` component heads for real combinations.

    With no moment this is the paper's initialisation: the SVD of the (d·D) × H matrix with a head in each column.
    Components are scaled to the size of an average head, so that they survive float16.

    Args:
        heads: (H, d, D + 1), float64.
        components: C, between 1 and H.
        moment: E[x xᵀ], see `gram`.

    Returns:
        Components (C·d, D + 1) and a composition (C, H).
    """
    count, head_dim = heads.shape[:2]
    values, vectors = torch.linalg.eigh(gram(heads, moment))  # ascending
    top = vectors.flip(-1)[:, :components]  # (H, C)
    # Signs are free; fixing them makes the bytes the same on every run and machine that agrees on the eigenvectors.
    top = top * torch.sign(top.gather(0, top.abs().argmax(0, keepdim=True)))
    norm = (values.clamp(min=0).sum() / count).sqrt()
    scale = norm / values.flip(-1)[:components].clamp(min=1e-24 * float(values[-1].clamp(min=1e-300))).sqrt()  # (C,)
    projection = torch.einsum("hc,hdx->cdx", top * scale, heads)
    return Composed("head", count, head_dim, projection.flatten(0, 1), (top / scale).T.contiguous())
