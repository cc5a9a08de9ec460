"""A form from outside the package: every value head is a d x d map of its group's component."""

import torch

from .attention_mea import Composition, register_form
from .section_mea import Form


def _maps(width, both, heads, head_dim):
    return heads, head_dim, head_dim


class MappedComposition(Composition):
    """Head h = weight[h] @ component of its group (weight: H x d x d)."""

    def reset(self):
        """Every head is its group's component."""
        from transformers import initialization as init

        init.copy_(self.weight, torch.eye(self.sizes.head_dim).expand_as(self.weight))

    def _of_each_head(self, components):
        parts = components.unflatten(-1, (-1, self.sizes.head_dim))
        return parts.repeat_interleave(self.sizes.heads // parts.shape[-2], dim=-2)

    def rebuild(self, components):
        """(B, T, C * d) -> (B, T, H, d)."""
        return torch.einsum("bthe,hde->bthd", self._of_each_head(components), self.weight)

    def contract(self, outputs):
        """(B, H, rows, C * d) -> (B, H, rows, d)."""
        parts = torch.diagonal(self._of_each_head(outputs), dim1=1, dim2=3)  # (B, rows, d, H)
        return torch.einsum("breh,hde->bhrd", parts, self.weight.to(outputs.dtype))


FORM = Form("mapped", sides=("value",), weight_shape=_maps, absorbs=("value",))
register_form(FORM, MappedComposition)


def expansion(side):
    """The linear map from components to heads, (H * d, width)."""
    import numpy as np

    heads, head_dim = side.heads, side.head_dim
    width = len(side.projection)
    whole = np.zeros((heads, head_dim, width))
    for head, block in enumerate(side.weight):
        start = head * (width // head_dim) // heads * head_dim
        whole[head, :, start : start + head_dim] = block
    return whole.reshape(-1, width)
