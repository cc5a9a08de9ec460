"""An export that computes something else does not appear."""

import numpy as np
import pytest
import torch
from exporting import compressed
from tiny import stock_checkpoint

from mea_compress.architectures import open_checkpoint
from mea_compress.errors import VerificationError
from mea_compress.exporting import fold, verification
from mea_compress.exporting.form import stock_form
from mea_compress.exporting.stock import export
from mea_compress.exporting.verification import verify_export

WRONG = {
    "larger": lambda array: 1.01 * array,
    "in another order": lambda array: np.roll(array, 1, axis=0),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("projection", ["absorbed_queries", "ordered_keys", "absorbed_output"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_projection_that_was_folded_wrongly_is_noticed(wrong, projection, whole, tmp_path, monkeypatch):
    out = compressed(tmp_path)
    right = getattr(fold, projection)
    monkeypatch.setattr(fold, projection, lambda *arguments: WRONG[wrong](right(*arguments)))
    monkeypatch.setattr(verification, "WHOLE_MODEL_BYTES", 1 << 30 if whole else 0)
    with pytest.raises(VerificationError, match="differs"):
        export(out, tmp_path / "export", progress=False)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_another_layer_s_weights_are_noticed(whole, tmp_path, monkeypatch):
    out = compressed(tmp_path)
    export(out, tmp_path / "export", progress=False)
    source = open_checkpoint(out)
    form = stock_form(source, source.config.mea["layers"])
    monkeypatch.setattr(verification, "WHOLE_MODEL_BYTES", 1 << 30 if whole else 0)
    result = verify_export(source, form, tmp_path / "export", progress=False)
    assert result["attention_difference"] < 1e-5 and ("logit_difference" in result) == whole
    assert result["kv_bytes_per_token"] == 2 * 2 * 2 * 4 * 4  # layers, sides, components, channels, bytes
    read = source.reader.read
    monkeypatch.setattr(source.reader, "read", lambda name: read(name.replace("layers.0", "layers.1")))
    with pytest.raises(VerificationError, match="differs"):
        verify_export(source, form, tmp_path / "export", progress=False)


def test_rounding_of_stored_weights_is_told_apart_from_what_is_computed(tmp_path):
    stock_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    out = compressed(tmp_path, way="frequency")
    result = export(out, tmp_path / "export", progress=False).verification
    assert result["attention_difference"] > 1e-3 > 1e-5 > result["attention_difference_float32"] > 0
