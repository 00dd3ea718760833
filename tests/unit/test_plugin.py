"""A plugin is a module whose name is the name in the recipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ftune import plugin
from ftune.options import Options

_KINDS = {
    plugin.OPTIMIZERS: plugin.Optimizer,
    plugin.TUNINGS: plugin.Tuning,
    plugin.OBJECTIVES: plugin.Objective,
    plugin.FORMATS: plugin.Format,
    plugin.EXPORTS: plugin.Export,
}
_ALL = [(kind, name) for kind in _KINDS for name in plugin.names(kind)]


@pytest.mark.parametrize(("kind", "name"), _ALL)
def test_plugin_says_what_it_is(kind: str, name: str) -> None:
    found = plugin.get(kind, name)
    assert isinstance(found, _KINDS[kind])
    assert found.name == name == type(found).__module__.rpartition(".")[2]
    assert found.summary.endswith((".", "!", "?"))
    assert issubclass(found.Options, Options)


@pytest.mark.parametrize("name", plugin.names(plugin.OPTIMIZERS))
def test_optimizer_facts(name: str) -> None:
    found = plugin.optimizer(name)
    assert isinstance(found.gradients, plugin.Gradients)
    assert found.state_bytes_per_parameter >= 0
    assert found.default_learning_rate > 0
    assert found.learning_rate_reason
    assert set(found.device_notes) <= {"cpu", "cuda"}
    assert found.Options()


def test_unknown_names() -> None:
    with pytest.raises(KeyError):
        plugin.optimizer("no_such")
    with pytest.raises(KeyError):
        plugin.optimizer("_private")


def test_finding_every_plugin_imports_no_torch() -> None:
    program = (
        "import sys; from ftune import plugin\n"
        "for kind in (plugin.OPTIMIZERS, plugin.TUNINGS, plugin.OBJECTIVES, plugin.FORMATS, plugin.EXPORTS):\n"
        "    for name in plugin.names(kind): plugin.get(kind, name)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'numpy'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_customary_learning_rate() -> None:
    full, lora = plugin.tuning("full"), plugin.tuning("lora")
    assert plugin.customary_learning_rate(plugin.optimizer("adamw_torch"), full)[0] == 5e-5
    rate, why = plugin.customary_learning_rate(plugin.optimizer("sgd"), lora)
    assert rate == pytest.approx(2e-4 * 200)
    assert "times 200" in why
    rate, why = plugin.customary_learning_rate(plugin.optimizer("mezo"), lora)
    assert rate == 5e-5
    assert "published" in why
    assert "times" not in why
    assert plugin.customary_learning_rate(plugin.optimizer("mezo"), full)[0] == 1e-6
