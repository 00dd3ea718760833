"""Rows on the machine; each brings a machine on which its bad example fails."""

from __future__ import annotations

from dataclasses import replace

from ftune.machine import Gpu, Machine
from ftune.rules.rule import Facts, Rule

_NAMES = ("torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "flash_attn", "schedulefree")
_PACKAGES = dict.fromkeys(_NAMES, "1")
_CPU = Machine(packages=_PACKAGES)
_TURING = Machine(gpus=(Gpu("Tesla T4", 16 * 2**30, (7, 5)),), packages=_PACKAGES)
_AMPERE = Machine(gpus=(Gpu("NVIDIA A100", 80 * 2**30, (8, 0)),), packages={**_PACKAGES, "tensorboard": "1"})
_CPU_BUILD = replace(_AMPERE, packages={**_AMPERE.packages, "torch": "2.13.0+cpu"})
_CUDA_BUILD = replace(_AMPERE, packages={**_AMPERE.packages, "torch": "2.13.0+cu130"})


def _capability(facts: Facts) -> tuple[int, int]:
    assert facts.machine is not None
    return min((gpu.capability for gpu in facts.machine.gpus), default=(0, 0))


def _missing_packages(facts: Facts) -> bool:
    return bool(facts.words()["missing"])


def _flash_package_missing(facts: Facts) -> bool:
    if facts.flash is None or facts.machine is None or facts.device_type == "cpu":
        return False
    return not facts.machine.has(facts.flash.package)


def _flash_too_new(facts: Facts) -> bool:
    return facts.flash is not None and facts.device_type == "cuda" and _capability(facts) < facts.flash.capability


RULES: tuple[Rule, ...] = (
    Rule(
        id="gpu-needs-cuda-build",
        at="model.model_name_or_path",
        when=lambda f: f.machine is not None and f.machine.lacks_cuda,
        what="the PyTorch that is installed cannot use this machine's GPU",
        because="torch {torch} is built for CPUs alone",
        instead="{torch_install}; or train on the processor, with CUDA_VISIBLE_DEVICES= before the command",
        label="would be trained on the GPU",
        needs="machine",
        bad_machine=_CPU_BUILD,
        good_machine=_CUDA_BUILD,
        bad={"model": {"model_name_or_path": "my-model"}},
        good={"model": {"model_name_or_path": "my-model"}},
    ),
    Rule(
        id="visible-device-unknown",
        at="model.model_name_or_path",
        when=lambda f: f.machine is not None and bool(f.machine.unknown_device),
        what="CUDA_VISIBLE_DEVICES names `{unknown_device}`, and there is no such GPU",
        because="CUDA hides that entry and all after it: what is left is {devices}",
        instead="`nvidia-smi -L` lists the names there are",
        label="will be trained there",
        severity="warning",
        needs="machine",
        bad_machine=replace(_CPU, unknown_device="MIG-5c6b"),
        good_machine=_CPU,
        bad={"model": {"model_name_or_path": "my-model"}},
        good={"model": {"model_name_or_path": "my-model"}},
    ),
    Rule(
        id="fp16-needs-gpu",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and f.device_type == "cpu",
        what="fp16 cannot run on a CPU",
        because="there is no loss scaler for CPUs, and Hugging Face would train in float32 without a word",
        instead="set fp16: false; bf16: true is the fast type on CPUs",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"fp16": True}},
        good={"training": {"fp16": False, "bf16": True}},
    ),
    Rule(
        id="half-weights-on-cpu",
        at="model.dtype",
        when=lambda f: f.recipe.model.dtype == "float16" and f.device_type == "cpu",
        what="float16 weights cannot be trained on a CPU",
        because="CPUs compute float16 slower than float32 and without a loss scaler",
        instead="set model.dtype: bfloat16 or auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"model": {"dtype": "float16"}, "tuning": {"method": "lora"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "lora"}},
    ),
    Rule(
        id="bf16-needs-ampere",
        at="training.bf16",
        when=lambda f: f.recipe.training.bf16 is True and f.device_type == "cuda" and _capability(f) < (8, 0),
        what="this GPU does not compute bfloat16",
        because="bfloat16 came with Ampere (compute capability 8.0)",
        instead="set bf16: false and fp16: true",
        needs="machine",
        bad_machine=_TURING,
        bad={"training": {"bf16": True}},
        good={"training": {"fp16": True}},
    ),
    Rule(
        id="tf32-needs-ampere",
        at="training.tf32",
        when=lambda f: f.recipe.training.tf32 is True and (f.device_type == "cpu" or _capability(f) < (8, 0)),
        what="this machine has no TF32",
        because="TF32 is a mode of Ampere and newer GPUs",
        instead="set tf32: auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"tf32": True}},
        good={"training": {"tf32": False}},
    ),
    Rule(
        id="flash-attention-needs-gpu",
        at="model.attn_implementation",
        when=lambda f: f.flash is not None and f.device_type == "cpu",
        what="{attention} cannot run on a CPU",
        because="its kernels are written for GPUs",
        instead="set attn_implementation: auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"model": {"attn_implementation": "flash_attention_2"}},
        good={"model": {"attn_implementation": "sdpa"}},
    ),
    Rule(
        id="flash-attention-needs-newer-gpu",
        at="model.attn_implementation",
        when=_flash_too_new,
        what="{attention} does not run on this GPU",
        because="flash_attention_2 needs Ampere (compute capability 8.0), flash_attention_3 needs Hopper (9.0)",
        instead="set attn_implementation: auto",
        needs="machine",
        bad_machine=_TURING,
        bad={"model": {"attn_implementation": "flash_attention_2"}},
        good={"model": {"attn_implementation": "sdpa"}},
    ),
    Rule(
        id="flash-attention-needs-package",
        at="model.attn_implementation",
        when=_flash_package_missing,
        what="{attention} is not installed",
        because="transformers takes its kernels from the package {flash_package}",
        instead="{flash_install}, or set attn_implementation: auto",
        needs="machine",
        bad_machine=Machine(gpus=_AMPERE.gpus, packages={"torch": "1"}),
        bad={"model": {"attn_implementation": "flash_attention_2"}},
        good={"model": {"attn_implementation": "sdpa"}},
    ),
    Rule(
        id="bf16-weights-need-ampere",
        at="model.dtype",
        when=lambda f: f.recipe.model.dtype == "bfloat16" and f.device_type == "cuda" and _capability(f) < (8, 0),
        what="this GPU computes bfloat16 by detours",
        because="bfloat16 came with Ampere (compute capability 8.0): older GPUs convert at every step, and are slow",
        instead="set model.dtype: auto",
        severity="warning",
        needs="machine",
        bad_machine=_TURING,
        bad={"model": {"dtype": "bfloat16"}, "tuning": {"method": "lora"}},
        good={"model": {"dtype": "float16"}, "tuning": {"method": "lora"}},
    ),
    Rule(
        id="tracker-missing",
        at="training.report_to",
        when=lambda f: bool(f.missing_trackers()),
        what="{trackers} is not installed",
        because="report_to asks for it",
        instead="pip install {tracker_packages}, or set report_to: none",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"report_to": "tensorboard"}},
        good={"training": {"report_to": "none"}},
    ),
    Rule(
        id="package-missing",
        at="training.optim",
        when=_missing_packages,
        what="{missing} is not installed",
        because="{optim} with {tuning} cannot run without it",
        instead="pip install {packages}",
        needs="machine",
        bad_machine=Machine(packages={"torch": "1"}),
        bad={"training": {"optim": "adamw_8bit"}},
        good={"training": {"optim": "adamw_torch"}},
    ),
    Rule(
        id="optimizer-on-this-device",
        at="training.optim",
        when=lambda f: f.device_type in f.optimizer.device_notes,
        what="{optim} is not itself on this machine",
        because="{device_note}",
        instead="choose another optim, or go on",
        severity="note",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"optim": "paged_adamw_8bit"}},
        good={"training": {"optim": "adamw_8bit"}},
    ),
)
