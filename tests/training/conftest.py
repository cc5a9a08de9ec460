"""A teacher and a student for all tests of distillation."""

import copy

import pytest
import torch
from tiny import stock_model


@pytest.fixture
def pair():
    """A teacher, and a student whose attention weights were moved."""
    teacher = stock_model("llama").eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(2)
    for name, weight in student.named_parameters():
        if "self_attn" in name:
            weight.data += 0.5 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
            weight.requires_grad_(True)
    return student, teacher
