"""What CUDA's caching allocator really does: the truth that `ftune/memory/allocator.py` is compared with.

Needs a CUDA GPU and torch >= 2.9; the training steps also need transformers. Every part runs in a process of its own,
since the allocator's settings, the context and the libraries' workspaces are those of a process.

    python benchmarks/allocator.py --output results

writes `results/allocator.json`:
* `sequences`: random allocations and frees, and what the allocator said after each; the least limit in which they pass,
* `constants`: what the context and the libraries take beside the tensors, and every allocation inside single operators,
* `training`: all allocations of real training steps, with the peaks,
* `speeds`: products, copies, launches and whole steps per second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MIB = 1024 * 1024

SETTINGS = {
    "default": "",
    "expandable": "expandable_segments:True",
    "split": "max_split_size_mb:64",
    "roundup": "roundup_power2_divisions:4",
}
SEQUENCES = [(name, limit_mib) for name in SETTINGS for limit_mib in (0, 1200)]
TRAINING = {
    # name: (allocator setting, dtype of the weights, autocast, optimizer, checkpointing)
    "bf16-foreach": ("default", "bfloat16", False, "foreach", False),
    "bf16-foreach-expandable": ("expandable", "bfloat16", False, "foreach", False),
    "bf16-fused": ("default", "bfloat16", False, "fused", False),
    "bf16-fused-checkpointed": ("default", "bfloat16", False, "fused", True),
    "autocast-fused": ("default", "float32", True, "fused", False),
    "float32-fused": ("default", "float32", False, "fused", False),
}
DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    """Run every part in a process of its own and join what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for allocator.json")
    parser.add_argument("--parts", default="sequences,constants,training,speeds")
    parser.add_argument("--events", type=int, default=2000, help="of each random sequence")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("PART", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        found = _worker(*options.worker, options)
        options.output.write_text(json.dumps(found, separators=(",", ":")))
        return 0

    options.output.mkdir(parents=True, exist_ok=True)
    joined: dict[str, Any] = {}
    failures = 0
    for part in options.parts.split(","):
        for name, setting in _cases(part):
            started = time.monotonic()
            found = _in_a_process(part, name, setting, options)
            failures += "error" in found
            joined.setdefault(part, {})[name] = found
            (options.output / "allocator.json").write_text(json.dumps(joined, separators=(",", ":")))
            print(f"{part} {name}: {time.monotonic() - started:.1f} s {found.get('error', '')}", flush=True)
    return 1 if failures else 0


def _cases(part: str) -> list[tuple[str, str]]:
    """Return name and allocator setting of each process of a part."""
    if part == "sequences":
        return [(f"{name}-{limit}", SETTINGS[name]) for name, limit in SEQUENCES]
    if part == "constants":
        return [(dtype, "") for dtype in DTYPES]
    if part == "training":
        return [(name, SETTINGS[facts[0]]) for name, facts in TRAINING.items()]
    return [("all", "")]


def _in_a_process(part: str, name: str, setting: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--output", str(found), "--worker", part, name]
        command += ["--events", str(options.events), "--seeds", str(options.seeds)]
        # PyTorch 2.9 knows both names of the variable, and 2.10 warns of the first.
        environment = {**os.environ, "PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting}
        if not setting:
            del environment["PYTORCH_ALLOC_CONF"], environment["PYTORCH_CUDA_ALLOC_CONF"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode or not found.exists():
            return {"error": (ended.stdout + ended.stderr)[-4000:]}
        return json.loads(found.read_text())


def _worker(part: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    if part == "constants":
        return constants(name)

    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "total_memory": torch.cuda.get_device_properties(0).total_memory,
        "setting": os.environ.get("PYTORCH_ALLOC_CONF", ""),
    }
    if part == "sequences":
        limit_mib = int(name.rpartition("-")[2])
        found["runs"] = [sequence(seed, options.events, limit_mib * _MIB) for seed in range(options.seeds)]
    elif part == "training":
        found.update(training(name))
    else:
        found.update(speeds())
    return found


# Random sequences


def random_events(seed: int, count: int, most_live_bytes: int = 3 * 1024 * _MIB) -> list[list[int]]:
    """Return [number, bytes] to allocate and [number, 0] to free, with sizes for every pool of the allocator."""
    draw = random.Random(seed)
    edges = [
        1,
        511,
        512,
        513,
        _MIB - 1,
        _MIB,
        _MIB + 1,
        10 * _MIB - 1,
        10 * _MIB,
        10 * _MIB + 1,
        20 * _MIB,
        32 * _MIB + 5,
    ]

    def new_size() -> int:
        kind = draw.random()
        if kind < 0.1:
            return draw.choice(edges)
        low, high = (0, 20) if kind < 0.5 else (20, 23.4) if kind < 0.8 else (23.4, 27.5)
        return int(2 ** draw.uniform(low, high))

    often = [new_size() for _ in range(24)]  # a model asks for the same sizes again and again
    events: list[list[int]] = []
    live: dict[int, int] = {}
    number = held = 0
    growing = True
    while len(events) < count:
        if draw.random() < 0.01:
            growing = not growing
        if not live or draw.random() < (0.6 if growing else 0.4):
            size = draw.choice(often) if draw.random() < 0.6 else new_size()
            if held + size <= most_live_bytes:
                events.append([number, size])
                live[number] = size
                held += size
                number += 1
                continue
        if live:
            numbers = list(live)
            freed = numbers[-1] if draw.random() < 0.4 else draw.choice(numbers)
            held -= live.pop(freed)
            events.append([freed, 0])
    return events


def sequence(seed: int, count: int, limit_bytes: int) -> dict[str, Any]:
    """Run random events, and without a limit find the least one in which they pass."""
    import torch

    events = random_events(seed, count)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.empty(1, device="cuda")  # the context, before anything is measured
    _restart(limit_bytes or total)
    said = _replay(events)
    least = 0
    if not limit_bytes:
        low, high = max(said["allocated"]) // _MIB, max(said["reserved"]) // _MIB
        while low < high:
            middle = (low + high) // 2
            _restart(middle * _MIB)
            if _replay(events, stop_when_full=True)["full"]:
                low = middle + 1
            else:
                high = middle
        least = high * _MIB
    return {"seed": seed, "limit_bytes": limit_bytes, "events": events, "least_limit_bytes": least, **said}


def _restart(limit_bytes: int) -> None:
    import torch

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes + 0.5) / total))
    torch.cuda.reset_peak_memory_stats()


def _replay(events: list[list[int]], stop_when_full: bool = False) -> dict[str, Any]:
    """Do the events; `full` lists the positions of those for which there was no room, which are passed over."""
    import torch

    said: dict[str, Any] = {
        name: [] for name in ("address", "allocated", "most_allocated", "reserved", "most_reserved", "full")
    }
    live: dict[int, Any] = {}
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    for position, (number, size) in enumerate(events):
        address = 0
        if size:
            try:
                live[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
                address = live[number].data_ptr()
            except torch.cuda.OutOfMemoryError:
                said["full"].append(position)
                if stop_when_full:
                    break
        else:
            live.pop(number, None)
        if not stop_when_full:
            said["address"].append(address)
            said["allocated"].append(torch.cuda.memory_allocated())
            said["most_allocated"].append(torch.cuda.max_memory_allocated())
            said["reserved"].append(torch.cuda.memory_reserved())
            said["most_reserved"].append(torch.cuda.max_memory_reserved())
    said["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
    return said


# Constants


def _used_bytes() -> int:
    """Return the bytes in use on the first GPU, asked of the driver without making a context."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    except ImportError:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(answer.stdout.strip()) * _MIB


def constants(dtype_name: str) -> dict[str, Any]:
    """Measure what a process takes beside its tensors, step by step, with products of one dtype."""
    before = _used_bytes()
    import torch
    from torch.nn import functional

    stages: list[dict[str, Any]] = []
    torch.cuda.init()  # before it there is no allocator that could record
    torch.cuda.memory._record_memory_history(context=None, max_entries=10_000_000)
    recorded = 0

    def stage(name: str, work: Callable[[], Any]) -> Any:
        """Do the work; note what the allocator and the driver say after it, and every allocation inside it."""
        nonlocal recorded
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        first = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        events, recorded = _compact(trace[recorded:]), len(trace)
        stages.append(
            {
                "name": name,
                "allocated_before": first,
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "used_beside_reserved": _used_bytes() - before - torch.cuda.memory_reserved(),
                "result_bytes": _bytes_of(result),
                "events": events,
            }
        )
        return result

    dtype = getattr(torch, dtype_name)
    stage("context", torch.cuda.synchronize)
    stage("first allocation", lambda: torch.empty(1, device="cuda"))
    stage("elementwise", lambda: torch.ones(1000, device="cuda", dtype=dtype) * 2)
    a = stage("make 4 x 512 x 768", lambda: torch.randn(4, 512, 768, device="cuda", dtype=dtype, requires_grad=True))
    w = stage("make 768 x 3072", lambda: torch.randn(3072, 768, device="cuda", dtype=dtype, requires_grad=True))
    b = stage("make bias", lambda: torch.randn(3072, device="cuda", dtype=dtype, requires_grad=True))
    y = stage("first product", lambda: functional.linear(a, w))
    seed = stage("make gradient", lambda: torch.ones_like(y))
    stage("first backward", lambda: torch.autograd.grad(y, (a, w), seed, retain_graph=True))
    stage("second backward", lambda: torch.autograd.grad(y, (a, w), seed))
    y = stage("product with bias", lambda: functional.linear(a, w, b))
    stage("backward with bias", lambda: torch.autograd.grad(y, (a, w, b), seed))
    stage("batched product", lambda: torch.bmm(a, a.transpose(1, 2)))
    y = seed = None

    heads = [
        stage(f"make {name}", lambda n=n: torch.randn(4, n, 512, 64, device="cuda", dtype=dtype, requires_grad=True))
        for name, n in (("q", 12), ("k", 12), ("v", 12), ("k of 4", 4), ("v of 4", 4))
    ]
    q, k, v, few_k, few_v = heads
    mask = torch.ones(4, 1, 512, 512, device="cuda", dtype=torch.bool).tril()
    attentions: dict[str, Callable[[], Any]] = {
        "attention, causal": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "attention, masked": lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "attention, grouped": lambda: functional.scaled_dot_product_attention(
            q, few_k, few_v, is_causal=True, enable_gqa=True
        ),
        "attention, dropout": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
    }
    for name, attend in attentions.items():
        inputs = (q, few_k, few_v) if "grouped" in name else (q, k, v)
        out = stage(name, attend)
        gradient = torch.ones_like(out)
        stage(name + ", backward", lambda out=out, i=inputs, g=gradient: torch.autograd.grad(out, i, g))
        del out, gradient
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        for masked in (False, True):
            name = f"attention, {backend}{', masked' if masked else ''}"
            try:
                with sdpa_kernel([getattr(SDPBackend, backend)]):
                    out = stage(
                        name,
                        lambda m=masked: functional.scaled_dot_product_attention(
                            q, k, v, attn_mask=mask if m else None, is_causal=not m
                        ),
                    )
                    gradient = torch.ones_like(out)
                    stage(name + ", backward", lambda o=out, g=gradient: torch.autograd.grad(o, (q, k, v), g))
                    del out, gradient
            except RuntimeError as refused:
                stages.append({"name": name, "refused": str(refused)[:300]})
    heads = q = k = v = few_k = few_v = mask = attentions = inputs = attend = None

    tokens = torch.randint(0, 32000, (4, 512), device="cuda")
    table = torch.randn(32000, 768, device="cuda", dtype=dtype, requires_grad=True)
    hidden = torch.randn(2048, 768, device="cuda", dtype=dtype, requires_grad=True)
    wide = torch.randn(2048, 32000, device="cuda", dtype=dtype, requires_grad=True)
    scale = torch.ones(768, device="cuda", dtype=dtype, requires_grad=True)
    cases: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
        "embedding": (lambda: functional.embedding(tokens, table), (table,)),
        "cross entropy": (lambda: functional.cross_entropy(wide, tokens.flatten()), (wide,)),
        "cross entropy of float32 copy": (lambda: functional.cross_entropy(wide.float(), tokens.flatten()), (wide,)),
        "log softmax": (lambda: functional.log_softmax(wide, dim=-1), (wide,)),
        "layer norm": (lambda: functional.layer_norm(hidden, (768,), scale, scale), (hidden, scale)),
        "rms norm": (lambda: functional.rms_norm(hidden, (768,), scale), (hidden, scale)),
        "silu": (lambda: functional.silu(hidden), (hidden,)),
        "gelu": (lambda: functional.gelu(hidden), (hidden,)),
        "dropout": (lambda: functional.dropout(hidden, 0.1), (hidden,)),
        "sum": (lambda: wide.sum(), (wide,)),
        "mean of squares": (lambda: wide.pow(2).mean(-1), (wide,)),
        "sort": (lambda: torch.sort(wide, dim=-1)[0], (wide,)),
        "topk": (lambda: torch.topk(wide, 8, dim=-1)[0], (wide,)),
        "cumsum": (lambda: torch.cumsum(wide, dim=-1), (wide,)),
        "gather": (lambda: torch.gather(wide, 1, tokens.view(-1, 1)), (wide,)),
        "index": (lambda: hidden[tokens.flatten() % 2048], (hidden,)),
    }
    for name, (work, inputs) in cases.items():
        out = stage(name, work)
        gradient = torch.ones_like(out)
        stage(name + ", backward", lambda o=out, i=inputs, g=gradient: torch.autograd.grad(o, i, g))
        del out, gradient
    wide = work = inputs = cases = None
    stage("norm of gradients", lambda: torch.nn.utils.clip_grad_norm_([_with_gradient(table), _with_gradient(w)], 1.0))
    for optimizer in ("foreach", "fused", "for-loop"):
        parameters = [table, w, b]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        chosen = torch.optim.AdamW(parameters, foreach=optimizer == "foreach", fused=optimizer == "fused")
        stage(f"AdamW {optimizer}, first step", chosen.step)
        stage(f"AdamW {optimizer}, second step", chosen.step)
        del chosen
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "total_memory": torch.cuda.get_device_properties(0).total_memory,
        "used_before": before,
        "mem_get_info": torch.cuda.mem_get_info(),
        "stages": stages,
    }


def _with_gradient(parameter: Any) -> Any:
    import torch

    parameter.grad = torch.ones_like(parameter)
    return parameter


def _bytes_of(result: Any) -> int:
    import torch

    if isinstance(result, torch.Tensor):
        return result.untyped_storage().nbytes() if result.is_cuda else 0
    return sum(map(_bytes_of, result)) if isinstance(result, list | tuple) else 0


def _driver() -> str:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout.strip()


def _compact(trace: list[dict[str, Any]]) -> list[list[Any]]:
    """Return [what, address, bytes] of each entry; a free is its request, since one stream completes it at once."""
    letters = {
        "alloc": "a",
        "free_requested": "f",
        "segment_alloc": "S",
        "segment_free": "F",
        "segment_map": "M",
        "segment_unmap": "U",
        "oom": "o",
    }
    return [
        [letters[entry["action"]], entry.get("addr", 0), entry["size"]] for entry in trace if entry["action"] in letters
    ]


# Training steps


def _model(torch: Any, dtype: Any, hidden: int, layers: int, heads: int, inner: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).to("cuda").train()


def training(name: str) -> dict[str, Any]:
    """Record every allocation of three steps of a Llama of about 110 M random weights, from before it is made."""
    import torch
    import transformers

    _, dtype_name, autocast, optimizer_name, checkpointed = TRAINING[name]
    torch.cuda.init()  # before it there is no allocator that could record
    torch.cuda.memory._record_memory_history(context=None, max_entries=10_000_000)
    marks: list[dict[str, Any]] = []

    def mark(phase: str) -> None:
        torch.cuda.synchronize()
        marks.append(
            {
                "phase": phase,
                "entries": len(_compact(torch.cuda.memory._snapshot()["device_traces"][0])),
                "allocated": torch.cuda.memory_allocated(),
                "most_allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "most_reserved": torch.cuda.max_memory_reserved(),
            }
        )

    shape = {"hidden": 768, "layers": 12, "heads": 12, "inner": 2048, "vocabulary": 32000}
    model = _model(torch, getattr(torch, dtype_name), **shape)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **{optimizer_name: True})
    tokens = torch.randint(0, 32000, (4, 512), generator=torch.Generator().manual_seed(0)).to("cuda")
    mark("start")
    for step in range(3):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        mark(f"forward {step}")
        loss.backward()
        mark(f"backward {step}")
        optimizer.step()
        mark(f"optimizer {step}")
        optimizer.zero_grad(set_to_none=True)
        mark(f"emptied {step}")
    return {
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "model": shape,
        "batch": [4, 512],
        "marks": marks,
        "events": _compact(torch.cuda.memory._snapshot()["device_traces"][0]),
    }


# Speeds


def _seconds(torch: Any, work: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median seconds of a call, after three warm-ups."""
    times = []
    for turn in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def speeds() -> dict[str, Any]:
    """Time products, copies, launches, and the phases of whole steps."""
    import torch

    found: dict[str, Any] = {"products": [], "copies": [], "steps": []}
    for dtype_name, tf32 in (("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for rows, inner, columns in (
            (8192, 8192, 8192),
            (4096, 4096, 4096),
            (2048, 4096, 14336),
            (2048, 2048, 2048),
            (2048, 768, 3072),
            (512, 4096, 4096),
        ):
            a = torch.randn(rows, inner, device="cuda", dtype=getattr(torch, dtype_name))
            b = torch.randn(columns, inner, device="cuda", dtype=getattr(torch, dtype_name))
            seconds = _seconds(torch, lambda a=a, b=b: a @ b.t())
            found["products"].append(
                {
                    "dtype": "tf32" if tf32 else dtype_name,
                    "shape": [rows, inner, columns],
                    "seconds": seconds,
                    "flops_per_second": 2 * rows * inner * columns / seconds,
                }
            )
    torch.backends.cuda.matmul.allow_tf32 = False
    for mebibytes in (1, 16, 256, 2048):
        a = torch.empty(mebibytes * _MIB, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        seconds = _seconds(torch, lambda a=a, b=b: b.copy_(a))
        found["copies"].append({"mib": mebibytes, "seconds": seconds, "bytes_per_second": 2 * a.numel() / seconds})
        del a, b
    pinned = torch.empty(256 * _MIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(256 * _MIB, dtype=torch.uint8, device="cuda")
    found["host_to_device"] = pinned.numel() / _seconds(torch, lambda: there.copy_(pinned, non_blocking=True))
    found["device_to_host"] = pinned.numel() / _seconds(torch, lambda: pinned.copy_(there, non_blocking=True))
    small = torch.ones(16, device="cuda")
    found["launch_seconds"] = _seconds(torch, lambda: [small.add_(1) for _ in range(1000)]) / 1000

    small_model = {"hidden": 768, "layers": 12, "heads": 12, "inner": 2048, "vocabulary": 32000}
    big_model = {"hidden": 2304, "layers": 20, "heads": 18, "inner": 6144, "vocabulary": 32000}
    for shape, batch, dtype_name, autocast, checkpointed in (
        (small_model, (4, 512), "bfloat16", False, False),
        (small_model, (16, 1024), "bfloat16", False, False),
        (small_model, (16, 1024), "float32", False, False),
        (big_model, (4, 2048), "bfloat16", False, False),
        (big_model, (4, 2048), "bfloat16", False, True),
        (big_model, (4, 2048), "float32", True, False),
    ):
        try:
            found["steps"].append(_step_times(torch, shape, batch, dtype_name, autocast, checkpointed))
        except Exception:
            found["steps"].append({"error": traceback.format_exc()[-1500:]})
        torch.cuda.empty_cache()
    return found


def _step_times(
    torch: Any, shape: dict[str, int], batch: tuple[int, int], dtype_name: str, autocast: bool, checkpointed: bool
) -> dict[str, Any]:
    model = _model(torch, getattr(torch, dtype_name), **shape)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, 32000, batch, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for turn in range(13):
        moments = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        moments[0].record()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        moments[1].record()
        loss.backward()
        moments[2].record()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments[3].record()
        moments[3].synchronize()
        if turn >= 3:
            for number, phase in enumerate(phases):
                phases[phase].append(moments[number].elapsed_time(moments[number + 1]) / 1000)
    return {
        "model": shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "dtype": dtype_name,
        "autocast": autocast,
        "checkpointed": checkpointed,
        "seconds": {phase: sorted(times)[len(times) // 2] for phase, times in phases.items()},
        "most_allocated": torch.cuda.max_memory_allocated(),
        "most_reserved": torch.cuda.max_memory_reserved(),
    }


if __name__ == "__main__":
    sys.exit(main())
