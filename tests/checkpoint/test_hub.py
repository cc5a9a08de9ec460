"""Checkpoints named by their id on the hub: its cache's own layout, and a small server on the loopback address."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from click.testing import CliRunner
from letters import character_tokenizer, tiny_llama
from tiny import save

import mea_compress as mc
from mea_compress.checkpoint.hub import is_hub_id, local_directory, repository_of
from mea_compress.cli import cli
from mea_compress.errors import RequestError

OLD, NEW = "a" * 40, "b" * 40
TESTS = Path(__file__).parents[1]
QUICK = ("--kv-ratio", "0.5", "--fit", "weights", "--key-composition", "head", "--value-composition", "head")


@pytest.fixture
def source(tmp_path):
    source = save(tiny_llama(), tmp_path / "source")
    character_tokenizer().save_pretrained(source)
    return source


def cached(cache, source, name, commit, *refs):
    """Lays a directory into the hub's cache as a repository's commit: blobs, links to them, and what leads there."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.mark.parametrize("name", ["owner/name", "own.er/na-me_1.5", "owner/name@main", "owner/name@refs/pr/1"])
def test_ids_of_the_hub(name, cache):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    ["name", "/owner/name", "./name", "../name", "a/b/c", "owner/name@", "owner/", "own er/name", "x@main", "~/n"],
)
def test_names_that_are_paths(name, cache):
    assert not is_hub_id(name)
    assert local_directory(name) == Path(name)


def test_a_directory_wins_over_an_id_and_its_mistyped_sibling_is_a_path(cache):
    Path("models/llama").mkdir(parents=True)
    assert not is_hub_id("models/llama")
    assert not is_hub_id("models/lama")
    assert is_hub_id("models/lama@main")
    done = invoke("inspect", "models/lama")
    assert done.exit_code == 2
    assert done.stderr.startswith("mea-compress: models/lama: there is no such directory; give the path")


def test_what_is_neither_a_directory_nor_in_the_cache(cache, source):
    cached(cache, source, "owner/name", NEW, "main")
    for name in ("modles/llama", "owner/name@other"):
        done = invoke("plan", name, "--kv-ratio", "0.5")
        assert done.exit_code == 2
        assert done.stderr.startswith(f"mea-compress: {name}: there is no such directory, the hub cannot be reached")


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache, source):
    old = cached(cache, source, "owner/name", OLD, "v1", "refs/pr/1")
    (source / "generation_config.json").write_text("{}")
    new = cached(cache, source, "owner/name", NEW, "main")
    assert local_directory("owner/name") == local_directory("owner/name@main") == new
    assert local_directory("owner/name@v1") == local_directory("owner/name@refs/pr/1") == old
    assert local_directory(f"owner/name@{OLD}") == old
    assert repository_of(old) == repository_of(new) == "owner/name"
    assert repository_of(source) is None


def test_every_verb_takes_an_id(cache, source, tmp_path):
    cached(cache, source, "owner/name", NEW, "main")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a small model " * 200)
    assert "llama" in invoke("inspect", "owner/name").output
    assert invoke("plan", "owner/name@main", *QUICK).exit_code == 0
    done = invoke("compress", "owner/name@main", "half", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("half/compression.json").read_text())["source"] == "owner/name"
    assert not any(file.is_symlink() for file in Path("half").iterdir())
    assert sorted(os.listdir()) == ["half"]
    cached(cache, Path("half"), "owner/half", OLD, "main")

    evaluation = mc.evaluate("owner/half", reference="owner/name", text=str(text), progress=False)
    beside = mc.evaluate("half", reference=source, text=str(text), progress=False)
    assert evaluation.kl == beside.kl > 0
    model, tokenizer = mc.load("owner/half", device="cpu")
    assert model.config.model_type == "mea_llama"
    assert tokenizer is not None
    healed = mc.heal("owner/half", teacher="owner/name", out="healed", text=str(text), steps=1, progress=False)
    assert healed.kl_before > 0
    assert {file.name for file in Path("healed").glob("*_mea.py")} == {
        file.name for file in Path("half").glob("*_mea.py")
    }
    settings = {"text": str(text), "sequence_length": 16, "sequences": 8, "progress": False}
    assert mc.profile("owner/name", **settings).points
    assert mc.sweep("owner/name", "sweep", text=str(text), shares=[0.5], fit="weights", progress=False).points
    assert "owner/name" in json.loads(Path("sweep/sweep.json").read_text())["command"]
    Path("recipe.yaml").write_text(
        "kv_ratio: 0.5\nsource: owner/name@main\nfit: weights\nevaluate: {text: [TEXT]}\n".replace("TEXT", str(text))
    )
    assert mc.validate("recipe.yaml").report().endswith("of the cache of owner/name@main")
    result = mc.run("recipe.yaml", progress=False)
    assert result.compression.out == Path("name-recipe").absolute()
    assert result.evaluation.kl > 0


def test_an_export_of_an_id(cache, source):
    assert (
        invoke(
            "compress", source, "half", *QUICK[:4], "--key-composition", "pool", "--value-composition", "pool"
        ).exit_code
        == 0
    )
    cached(cache, Path("half"), "owner/half", OLD, "main")
    assert mc.export("owner/half", "stock", progress=False).model_type == "llama"


def test_what_lies_on_the_hub_is_not_replaced(cache, source):
    cached(cache, source, "owner/name", NEW, "main")
    done = invoke("heal", "owner/name@main", "--teacher", source)
    assert (done.exit_code, "cannot be replaced there: give --out" in done.stderr) == (2, True)
    done = invoke("refresh", "owner/name@main")
    assert (done.exit_code, "nothing can be replaced" in done.stderr) == (2, True)


def test_code_that_was_not_downloaded_is_not_missed(cache, source, tmp_path):
    mc.compress(source, tmp_path / "half", kv_ratio=0.5, fit="weights", progress=False)
    for file in (tmp_path / "half").glob("*.py"):
        file.unlink()
    cached(cache, tmp_path / "half", "owner/half", NEW, "main")
    assert mc.open("owner/half").code is None


def test_an_interrupted_download_is_said(cache, source):
    cached(cache, source, "owner/name", NEW, "main").joinpath("model.safetensors").unlink()
    done = invoke("inspect", "owner/name")
    assert (done.exit_code, "has no *.safetensors weights" in done.stderr) == (2, True)


class Hub(BaseHTTPRequestHandler):
    """What the hub answers of one repository; `asked` notes the files that were sent."""

    protocol_version = "HTTP/1.1"

    def __init__(self, files, asked, *rest):
        self.files, self.asked = files, asked
        super().__init__(*rest)

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        start, _, rest = path.partition("/owner/name/")
        if start == "/api/models" and rest in ("revision/main", "revision/v1"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "owner/name", "sha": NEW, "siblings": siblings}).encode())
        elif start == "/api/models" and rest == f"tree/{NEW}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in self.files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif start == "" and (name := rest.removeprefix(f"resolve/{NEW}/")) in self.files:
            if self.command == "GET":
                self.asked.append(name)
            body = self.files[name]
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=NEW)
        elif start == "/api/models" and rest.startswith("revision/"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/models/owner/gated"):
            self.answer(403, X_Error_Code="GatedRepo")
        else:
            self.answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(source):
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    files |= {
        "pytorch_model.bin": b"pickle",
        "modeling_own.py": b"raise SystemExit",
        "consolidated.safetensors": b"weights again",
        "original/model.safetensors": b"and again",
        "chat_template.jinja": b"{{ messages[0].content }}",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "tokenizer.model": b"pieces",
        "README.md": b"# Name",
        "LICENSE.txt": b"Apache",
    }
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files, asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
@pytest.mark.process
def test_from_a_server_and_again_without_it(hub, source, tmp_path):
    endpoint, files, asked = hub

    def run(*arguments, offline="0"):
        """The program in a process of its own: the hub's library reads its environment once."""
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": offline,
        }
        command = [sys.executable, "-m", "mea_compress", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    done = run("inspect", "owner/name@v1", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llama"
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / NEW
    kept = {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}
    left = {
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "original/model.safetensors",
    }
    assert kept == set(asked) == files.keys() - left
    for name in kept:
        assert (snapshot / name).read_bytes() == files[name]

    asked.clear()
    done = run("compress", "owner/name@v1", "half", *QUICK, offline="1")
    assert done.returncode == 0, done.stderr
    assert not asked
    for name, sentence in {
        "owner/name@v2": "the repository has no revision v2",
        "owner/gated": "its owner asks for consent first",
        "modles/llama": "there is no such directory, and no such repository",
    }.items():
        done = run("inspect", name)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"{name}: {sentence}" in done.stderr


def test_a_server_that_is_not_there(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RequestError, match=r"owner/name: there is no such directory, the hub cannot be reached"):
        local_directory("owner/name")
