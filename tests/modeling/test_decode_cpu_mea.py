import itertools
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from test_decode_mea import FLAT, MASK_KINDS, mask_of, parts, plain_products
from test_modeling_mea import build, decode, tokens

from mea_compress.modeling import attention_mea, decode_cpu_mea, decode_mea
from mea_compress.modeling.decode_cpu_mea import attend_on_cpu, library, readable
from mea_compress.modeling.decode_mea import fused, may_fuse

CAPABLE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and platform.system() == "Linux"
COMPILER = shutil.which((os.environ.get("CC") or "cc").split()[0]) is not None
needs_kernel = pytest.mark.skipif(
    not CAPABLE or not COMPILER, reason="needs Linux on a processor with AVX2, and a C compiler"
)
# Largest differences from plain products in float64.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def forget():
    library.cache_clear()
    decode_cpu_mea._multiplies_pairs.cache_clear()


@pytest.fixture(params=["as it is", "without pairs", "AVX2", "AVX2 with pairs"])
def processor(request, monkeypatch):
    """The kernel as it is built here, without products of bfloat16 pairs, and for processors without AVX-512."""
    if request.param.startswith("AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    forget()
    if request.param in ("without pairs", "AVX2"):
        monkeypatch.setattr(decode_cpu_mea, "_multiplies_pairs", lambda: False)
    yield request.param
    monkeypatch.undo()
    forget()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No kernel has been built yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    forget()
    yield tmp_path / "extensions"
    forget()


@pytest.fixture
def threads():
    """Two threads, whatever the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def difference(found, mask, new_tokens):
    """From plain products in float64."""
    given = None if mask is None else decode_mea._four_dimensional(mask, found[1].shape[2])
    output = attend_on_cpu(*found, given)
    assert output.dtype == found[0].dtype
    wide = [None if tensor is None else tensor.double() for tensor in found]
    return (output.double() - plain_products(*wide, mask, new_tokens)).abs().max()


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_the_kernel_does_what_plain_products_do(kind, norms, new_tokens, dtype, processor):
    if kind == "integer" and new_tokens > 1:
        pytest.skip("a mask of tokens is of a single new one")
    for length in (1, 7, 128, 300):
        found = parts(new_tokens, norms, dtype, length=length)
        assert difference(found, mask_of(kind, 2, 4, new_tokens, length), new_tokens) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("key_width", "value_width"), [(256, 512), (31, 33), (30, 70), (2, 1)])
@pytest.mark.parametrize(("heads", "groups"), [(32, 8), (33, 3), (5, 5), (80, 8)])
def test_widths_and_heads_of_any_number(heads, groups, key_width, value_width, dtype, processor, threads):
    widths = {"key_width": key_width, "value_width": value_width, "heads": heads, "groups": groups}
    for length, norms in itertools.product((257, 1000), (False, True)):
        found = parts(1, norms, dtype, length=length, **widths)
        assert difference(found, mask_of("boolean", 2, heads, 1, length), 1) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_cache_is_read_where_it_lies(dtype, processor, threads):
    """Slices of a longer cache, sequences that lie apart or are one and the same, channels that do not lie together."""
    queries, keys, values, _ = parts(1, False, dtype, length=200, key_width=32, value_width=32)
    longer = torch.full((2, 2, 300, 40), float("nan"), dtype=dtype)
    longer[:, :1, 50:250, 4:36] = keys
    across = values.transpose(2, 3).contiguous().transpose(2, 3)
    for found in (
        (queries, longer[:, :1, 50:250, 4:36], values, None),
        (queries, keys[:1].expand(2, -1, -1, -1), values, None),
        (queries, keys, across, None),
    ):
        assert difference(found, None, 1) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_logits_and_rows_that_see_nothing(dtype, processor):
    """The softmax neither overflows nor loses a late maximum; what sees nothing averages all, as products do."""
    queries, keys, values, _ = parts(1, False, dtype, length=300)
    for late in (0, 150, 299):
        keys[:, :, late] = 40 * queries[:, :, 0] / queries[:, :, 0].float().square().sum(-1, keepdim=True).to(dtype)
        assert difference((64 * queries, keys, values, None), None, 1) < 10 * TOLERANCE[dtype]
    nothing = torch.zeros(2, 1, 1, 300).bool()
    nothing[1, ..., 7] = True
    assert difference((queries, keys, values, None), nothing, 1) < TOLERANCE[dtype]
    hidden = torch.full((2, 1, 1, 300), -torch.inf)
    hidden[..., 250:] = 0
    assert difference((queries, keys, values, None), hidden, 1) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("broken", ["queries", "keys", "values"])
def test_what_is_not_a_number_is_not_hidden(broken, dtype, processor):
    found = parts(1, False, dtype, length=200)
    found[("queries", "keys", "values").index(broken)][0, 0, 3] = float("nan")
    output = attend_on_cpu(*found, None)
    assert output[0].isnan().any()
    assert output[1].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
@pytest.mark.parametrize(("keys", "values"), FLAT)
def test_a_model_decodes_through_it(keys, values, family, dtype, monkeypatch):
    """Every flat composition, with a sliding window and padding, as with heads that are expanded."""
    asked = []
    monkeypatch.setattr(decode_mea, "attend_on_cpu", lambda *found: asked.append(attend_on_cpu(*found)) or asked[-1])
    changes = {"sliding_window": 4} if family == "Mistral" else {}
    model = build(family, keys, values, dtype=dtype, **changes)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        found = {}
        for choice in ("expand", "absorb"):
            model.config.mea["decode"] = choice
            found[choice], _ = decode(model, ids, 6, **options)
        seen = mask.bool() if options else torch.ones_like(mask).bool()
        scale = found["expand"].abs().max()
        error = (found["absorb"][seen] - found["expand"][seen]).abs().max() / scale
        assert error < {torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
        assert asked and all(output is not None for output in asked)
        asked.clear()


@needs_kernel
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(default):
    found, mask = parts(1, True, torch.float32, length=200), mask_of("boolean", 2, 4, 1, 200)
    expected = attend_on_cpu(*found, mask)
    torch.set_default_dtype(default)
    try:
        output = attend_on_cpu(*found, mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected)


@needs_kernel
def test_an_empty_batch(threads):
    found = [part[:0] for part in parts(1, False, torch.float32, length=300)[:3]]
    assert attend_on_cpu(*found, None, None).shape == (0, 1, 4, 16)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [-torch.inf, -1e4])
def test_additive_masks_of_other_dtypes(dtype, hidden):
    found = parts(3, True, torch.float32, length=200)
    seen = mask_of("boolean", 2, 4, 3, 200)
    assert difference(found, torch.where(seen, 0.0, hidden).to(dtype), 3) < TOLERANCE[torch.float32]


@needs_kernel
@pytest.mark.parametrize("shape", [(2, 4, 1, 200), (1, 1, 1, 200), (2, 1, 3, 250), (1, 1, 1, 1)])
def test_masks_are_broadcast_as_products_do_it(shape):
    found = parts(3, False, torch.float32, length=200)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[..., :1] = True
    output = fused(*found, mask, 3)
    torch.testing.assert_close(output, plain_products(*found, mask, 3), rtol=0, atol=2e-6)


@needs_kernel
@pytest.mark.parametrize("shape", [(2, 1, 1, 100), (3, 1, 1, 200), (2, 8, 1, 200), (2, 1, 2, 200)])
def test_masks_that_do_not_fit_are_left_to_products(shape):
    found = parts(3, False, torch.float32, length=200)
    assert fused(*found, torch.zeros(shape), 3) is None
    with pytest.raises(RuntimeError):
        plain_products(*found, torch.zeros(shape), 3)


@needs_kernel
def test_gradients_traced_and_compiled_models_go_through_products(monkeypatch):
    queries, keys, values, _ = parts(1, False, torch.float32)
    assert may_fuse(keys, values, queries)
    queries.requires_grad_()
    assert not may_fuse(keys, values, queries)
    with torch.no_grad():
        assert may_fuse(keys, values, queries)
        for way in (torch.compiler, "is_compiling"), (torch.jit, "is_tracing"):
            with monkeypatch.context() as changed:
                changed.setattr(*way, lambda: True)
                assert not may_fuse(keys, values, queries)


def test_dtypes_that_it_does_not_read():
    for first, second in ((torch.float16,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)):
        assert not readable(torch.zeros(1, dtype=first), torch.zeros(1, dtype=second))


@needs_kernel
def test_it_is_built_once(fresh):
    assert library() is not None
    (built,) = fresh.rglob("*.so")
    first = built.stat().st_mtime_ns
    forget()
    assert library() is not None
    assert [built.stat().st_mtime_ns for built in fresh.rglob("*.so")] == [first]


@needs_kernel
def test_a_directory_that_cannot_be_written_to(fresh):
    fresh.write_text("no directory")
    assert library() is not None
    assert readable(torch.zeros(1))


@needs_kernel
def test_where_nobody_has_a_home(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert library() is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_kernel
def test_what_was_built_and_is_broken_is_built_again(fresh):
    assert library() is not None
    (built,) = fresh.rglob("*.so")
    built.write_bytes(b"")
    forget()
    assert library() is not None
    assert built.stat().st_size > 0


def test_without_a_compiler_or_on_another_processor_products_do_it(fresh, monkeypatch, recwarn):
    monkeypatch.setenv("CC", "a-compiler-that-nobody-has -with flags")
    assert not readable(torch.zeros(1))
    forget()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not readable(torch.zeros(1))
    assert not fresh.exists()
    assert not recwarn


@pytest.mark.skipif(not CAPABLE, reason="needs Linux on a processor with AVX2")
def test_a_compiler_command_that_makes_no_sense(fresh, monkeypatch):
    monkeypatch.setenv("CC", "'cc")
    with pytest.warns(UserWarning, match="'cc built no kernel"):
        assert not readable(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.skipif(not CAPABLE, reason="needs Linux on a processor with AVX2")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'decode.c:1:1: error: out of order' >&2; exit 1", "out of order"),
        ("printf 'error: \\377' >&2; exit 1", "error"),
        ("echo working >&2; exec sleep 60", "timed out"),
        ("exit 0", "decode.so"),
    ],
)
def test_a_compiler_that_fails_is_named_once_and_products_do_it(script, reason, fresh, monkeypatch, tmp_path, recwarn):
    broken = tmp_path / "broken-cc"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(decode_cpu_mea, "_SECONDS", 1)
    model = build("Llama", "head", "head", dtype=torch.float32)
    model.config.mea["decode"] = "absorb"
    found, _ = decode(model, tokens(1, 8), 6)
    said = [str(warning.message) for warning in recwarn if "plain products" in str(warning.message)]
    assert len(said) == 1
    assert str(broken) in said[0] and reason in said[0]
    model.config.mea["decode"] = "expand"
    torch.testing.assert_close(found, decode(model, tokens(1, 8), 6)[0], rtol=0, atol=1e-5)
    assert not list(fresh.rglob("*.so"))


@needs_kernel
def test_without_memory_products_do_it(monkeypatch):
    class Exhausted:
        def attend(self, job):
            return 1

    model = build("Llama", "head", "head", dtype=torch.float32)
    model.config.mea["decode"] = "absorb"
    expected, _ = decode(model, tokens(1, 8), 6)
    monkeypatch.setattr(decode_cpu_mea, "library", Exhausted)
    monkeypatch.setattr(attention_mea, "may_fuse", lambda *tensors: True)
    found, _ = decode(model, tokens(1, 8), 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


THREADS = """
import re
import torch
from mea_compress.modeling.decode_cpu_mea import attend_on_cpu, library
torch.set_num_threads(2)
torch.manual_seed(0)
found = [torch.randn(1, 1, size, 64) for size in (8, 500, 500)]
for _ in range(3):
    expected = torch.softmax(found[0] @ found[1].mT, -1) @ found[2]
    output = attend_on_cpu(*found, None, None)
print(bool((output - expected).abs().max() < 1e-5))
print(len(set(re.findall(r"\\S*lib[gi]?omp[0-9.-]\\S*", open("/proc/self/maps").read()))))
"""


@pytest.mark.process
@needs_kernel
def test_it_shares_the_threads_of_pytorch():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"]  # one OpenMP in the process
