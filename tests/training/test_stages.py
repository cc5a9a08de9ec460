"""What a student has of its original while it is healed."""

import pytest
import torch
from letters import tiny_llama

from mea_compress.training.stages import Stages


def pair(dtype, **changes):
    """An original, and a student of the same weights in float32."""
    teacher = tiny_llama(**changes).to(dtype).requires_grad_(False)
    student = tiny_llama(**changes)
    student.load_state_dict(teacher.state_dict())
    return student, teacher


def shared(student, teacher):
    """Names of the student's parameters that lie where the original's do."""
    places = {weight.data_ptr() for weight in teacher.parameters()}
    return {name for name, weight in student.named_parameters() if weight.data_ptr() in places}


def outside(student, *parts):
    return {name for name, _ in student.named_parameters() if not any(part in name for part in parts)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stage", "own"), [("attention", ["attn"]), ("lora", ["attn", "mlp"]), ("all", [""])])
def test_what_no_stage_trains_is_the_original_s(stage, own, tied):
    if stage == "lora":
        pytest.importorskip("peft")
    student, teacher = pair(torch.float32, tie_word_embeddings=tied)
    stages = Stages(student)
    stages.begin(stage)
    stages.share(teacher, torch.float32)
    assert shared(student, teacher) == outside(student, *own)


def test_what_a_later_stage_trains_stays_the_student_s():
    student, teacher = pair(torch.float32)
    stages = Stages(student)
    for stage in ("all", "attention"):
        stages.begin(stage)
    stages.share(teacher, torch.float32)
    assert shared(student, teacher) == set()


def test_what_differs_stays_the_student_s():
    student, teacher = pair(torch.float32)
    stages = Stages(student)
    stages.begin("attention")
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-6
        student.model.norm.weight *= 2
    values = {name: weight.clone() for name, weight in student.named_parameters()}
    stages.share(teacher, torch.float32)
    assert shared(student, teacher) == outside(student, "attn", "layers.1.mlp.up_proj", "model.norm")
    assert all(torch.equal(values[name], weight) for name, weight in student.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_linear_maps_alone_are_shared_in_the_products_of_16_bits(tied):
    """Norms and embeddings are float32 in the student; a head that is tied to embeddings is a linear map."""
    student, teacher = pair(torch.bfloat16, tie_word_embeddings=tied)
    stages = Stages(student)
    stages.begin("attention")
    stages.share(teacher, torch.float32)
    assert shared(student, teacher) == set()
    stages.share(teacher, torch.bfloat16)
    assert shared(student, teacher) == outside(student, "attn", "norm", *([] if tied else ["embed"]))
