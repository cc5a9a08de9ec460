import ctypes
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decode_mea import FLAT, MASK_KINDS, mask_of, parts, plain_products
from test_modeling_mea import build, decode, tokens

from mea_compress.modeling import attention_mea, configuration_mea, decode_cpu_mea, decode_mea
from mea_compress.modeling.decode_cpu_mea import attend_on_cpu, library, readable
from mea_compress.modeling.decode_mea import fused, may_fuse

CAPABLE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and platform.system() == "Linux"
COMPILER = shutil.which((os.environ.get("CC") or "cc").split()[0]) is not None
needs_kernel = pytest.mark.skipif(
    not CAPABLE or not COMPILER, reason="needs Linux on a processor with AVX2, and a C compiler"
)
# Largest differences from plain products in float64.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


TOOLS = Path(__file__).parents[2] / "tools"


def forget():
    decode_cpu_mea._compiled.cache_clear()
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


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """Nobody has forbidden the kernel, whatever the environment of the tests says."""
    monkeypatch.delenv("MEA_CPU_KERNEL", raising=False)


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
    monkeypatch.setattr(attention_mea, "may_fuse", lambda *tensors, **options: True)
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


@pytest.fixture
def embed_kernel():
    """The script that embeds the kernel, as a module."""
    spec = importlib.util.spec_from_file_location("embed_kernel", TOOLS / "embed_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_embedded_kernel_is_the_authored_one(embed_kernel):
    assert embed_kernel.KERNEL.read_text() == decode_cpu_mea.SOURCE
    embed_kernel.main(["--check"])


def test_a_stale_kernel_is_named_and_embedded(embed_kernel, monkeypatch, tmp_path, capsys):
    edited = decode_cpu_mea.SOURCE + "/* edited \\n */\n"
    kernel, module = tmp_path / "decode_cpu.c", tmp_path / "decode_cpu_mea.py"
    kernel.write_text(edited)
    before = embed_kernel.MODULE.read_text()
    module.write_text(before)
    monkeypatch.setattr(embed_kernel, "KERNEL", kernel)
    monkeypatch.setattr(embed_kernel, "MODULE", module)
    with pytest.raises(SystemExit, match=r"decode_cpu_mea\.py does not hold the present decode_cpu\.c"):
        embed_kernel.main(["--check"])
    assert module.read_text() == before
    embed_kernel.main([])
    embed_kernel.main(["--check"])
    assert module.read_text() == before.replace(decode_cpu_mea.SOURCE, edited)


@pytest.mark.parametrize("kernel", ['char *text = """";\n', "int last;"])
def test_a_kernel_that_no_raw_string_holds_is_refused(kernel, embed_kernel):
    with pytest.raises(ValueError, match="must end with a newline"):
        embed_kernel.embed(embed_kernel.MODULE.read_text(), kernel)


def test_a_module_without_markers_is_refused(embed_kernel):
    with pytest.raises(ValueError, match="lacks the markers"):
        embed_kernel.embed("SOURCE = None\n", "int last;\n")


def compile_kernel(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PYTHONPATH", str(TOOLS.parent), prepend=os.pathsep)
    return subprocess.run([sys.executable, TOOLS / "compile_kernel.py"], capture_output=True, text=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernel is for x86-64")
def test_the_kernel_is_linted_with_all_warnings_for_every_processor(monkeypatch, tmp_path):
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *avx512f*) echo warned >&2; exit 1;; esac\n')
    compiler.chmod(0o755)
    done = compile_kernel(monkeypatch, str(compiler))
    assert done.returncode == 1 and done.stderr == "warned\n"
    commands = log.read_text().splitlines()
    assert len(commands) == len(decode_cpu_mea.CPU_FLAGS)
    for command, flags in zip(commands, decode_cpu_mea.CPU_FLAGS.values(), strict=True):
        assert " ".join((*flags, "-Wall", "-Wextra", "-Werror")) in command


@needs_kernel
def test_the_kernel_compiles_without_a_warning(monkeypatch):
    done = compile_kernel(monkeypatch, os.environ.get("CC", ""))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_without_a_compiler_the_lint_says_so(monkeypatch):
    done = compile_kernel(monkeypatch, "a-compiler-that-nobody-has")
    assert done.returncode == 0
    assert done.stdout == "decode_cpu.c was not compiled: there is no C compiler (CC, or cc)\n"


@needs_kernel
def test_both_sides_declare_the_same_job(tmp_path):
    """The compiler refuses the file where a field lies elsewhere, has another size, or is missing in Python."""
    job = decode_cpu_mea._Job
    asserts = [f'_Static_assert(sizeof(job) == {ctypes.sizeof(job)}, "job");']
    for name, _ in job._fields_:
        field = getattr(job, name)
        same = f"offsetof(job, {name}) == {field.offset} && sizeof(((job *)0)->{name}) == {field.size}"
        asserts.append(f'_Static_assert({same}, "{name}");')
    source = tmp_path / "layout.c"
    source.write_text("\n".join((decode_cpu_mea.SOURCE, "#include <stddef.h>", *asserts, "")))
    compiler = [*shlex.split(os.environ.get("CC") or "cc"), *decode_cpu_mea.CPU_FLAGS["AVX2"], "-fsyntax-only"]
    done = subprocess.run([*compiler, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_job_has_the_fields_of_the_kernel_and_no_others():
    assert dict(decode_cpu_mea._Job._fields_)["keys"] is ctypes.c_void_p
    assert dict(decode_cpu_mea._Job._fields_)["mask_rows"] is ctypes.c_int64
    for misspelt in ({"row_maximum": 0}, {"spans": 1}):
        with pytest.raises(AttributeError):
            decode_cpu_mea._Job(**misspelt)


def test_a_field_of_another_type_is_refused():
    with pytest.raises(KeyError, match="float"):
        decode_cpu_mea._job_fields("typedef struct {\n    float scale; /* by value */\n} job;\n")


@pytest.fixture
def compiler_log(monkeypatch, tmp_path):
    """A compiler that writes a line to this file when it runs."""
    compiler, log = tmp_path / "logging-cc", tmp_path / "compiler.log"
    compiler.write_text(f"#!/bin/sh\necho ran >> {log}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    return log


@pytest.mark.parametrize("switch", ["off", "0"])
def test_the_environment_forbids_the_compiler(switch, fresh, compiler_log, monkeypatch, recwarn):
    monkeypatch.setenv("MEA_CPU_KERNEL", switch)
    model = build("Llama", "head", "head", dtype=torch.float32)
    model.config.mea["decode"] = "absorb"
    decode(model, tokens(1, 8), 6)
    assert library() is None and not readable(torch.zeros(1))
    assert not compiler_log.exists() and not fresh.exists()
    assert not [warning for warning in recwarn if "plain products" in str(warning.message)]


@needs_kernel
@pytest.mark.parametrize("switch", ["on", "1"])
def test_the_environment_allows_the_compiler(switch, monkeypatch):
    monkeypatch.setenv("MEA_CPU_KERNEL", switch)
    assert readable(torch.zeros(1))


@needs_kernel
def test_the_environment_is_obeyed_after_the_kernel_was_built(monkeypatch):
    assert readable(torch.zeros(1))
    monkeypatch.setenv("MEA_CPU_KERNEL", "off")
    assert not readable(torch.zeros(1))
    monkeypatch.delenv("MEA_CPU_KERNEL")
    assert readable(torch.zeros(1))


@pytest.mark.parametrize("switch", ["", "no", "OFF"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(switch, fresh, compiler_log, monkeypatch):
    monkeypatch.setenv("MEA_CPU_KERNEL", switch)
    with pytest.raises(ValueError, match=f"^MEA_CPU_KERNEL is one of on, 1, off, 0, not '{switch}'$"):
        readable(torch.zeros(1))
    assert not compiler_log.exists()


def test_the_configuration_forbids_the_compiler(fresh, compiler_log):
    model = build("Llama", "head", "head", dtype=torch.float32)
    model.config.mea |= {"decode": "absorb", "cpu_kernel": False}
    decode(model, tokens(1, 8), 6)
    assert not compiler_log.exists() and not fresh.exists()


@needs_kernel
def test_the_configuration_forbids_the_kernel_and_nothing_else(monkeypatch):
    """Each model asks its own configuration, and both read the same numbers."""
    asked = []
    monkeypatch.setattr(decode_mea, "attend_on_cpu", lambda *found: asked.append(1) or attend_on_cpu(*found))
    model = build("Llama", "head", "head", dtype=torch.float32)
    model.config.mea["decode"] = "absorb"
    found = {}
    for allowed in (False, True):
        model.config.mea["cpu_kernel"] = allowed
        found[allowed], _ = decode(model, tokens(1, 8), 6)
        assert bool(asked) == allowed
    torch.testing.assert_close(found[False], found[True], rtol=0, atol=1e-5)


def test_the_configuration_keeps_the_key_and_writes_none_of_its_own(tmp_path):
    for section in ({}, {"cpu_kernel": False}, {"cpu_kernel": True}):
        configuration_mea.MeaLlamaConfig(mea=dict(section)).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["mea"]
        assert {key: value for key, value in stored.items() if key == "cpu_kernel"} == section
        assert configuration_mea.MeaLlamaConfig.from_pretrained(tmp_path).mea == stored


@pytest.mark.parametrize("value", ["off", 0, None])
def test_a_key_that_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match=f"cpu_kernel is true or false, not {value!r}"):
        configuration_mea.MeaLlamaConfig(mea={"cpu_kernel": value})
