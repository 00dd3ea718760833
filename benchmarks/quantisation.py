"""What is left after merging into few bits: LoRA and QLoRA rounded afterwards, and QA-LoRA, on SmolLM2-135M.

    python benchmarks/quantisation.py search [--jobs 2]    the best rate of each, by the loss after 40 steps
    python benchmarks/quantisation.py final [--jobs 2]     200 steps of each at its best rate, merged in every way
    python benchmarks/quantisation.py cost                 time of a step and live bytes; on an idle machine
    python benchmarks/quantisation.py table

All adapters have rank 16 and alpha 32, all codes groups of 32 with a float32 scale and offset. An adapter of LoRA or
QLoRA is folded into the unquantised base, and the whole model then rounded: to the nearest code, or by GPTQ with 128
training rows. QA-LoRA's base is fitted by GPTQ with as many rows before training; its adapter goes into the offsets.
What was measured is kept in results/quantisation.jsonl.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rates import STAGES, Comparison, Method, Row, recipe

_GROUP, _CALIBRATION_ROWS = 32, 128
_SHAPE = {"r": 16, "lora_alpha": 32}
_BITS = (4, 3, 2)
METHODS = (
    Method("lora", 1e-3, tuning={"method": "lora", **_SHAPE}),
    Method("qlora", 1e-3, tuning={"method": "qlora", **_SHAPE}),
    *(
        Method(
            f"qalora, {bits} bits",
            1e-4,
            tuning={
                "method": "qalora",
                "bits": bits,
                "group_size": _GROUP,
                "calibration_rows": _CALIBRATION_ROWS,
                **_SHAPE,
            },
        )
        for bits in _BITS
    ),
)


def finish(method: Method, run: Path) -> Row:
    """Return an adapter's size, and the loss of its merged model as it is and in few bits."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from ftune import export

    pooled = _GROUP if method.tuning["method"] == "qalora" else 1
    # QA-LoRA's A is written with each column repeated for its group, so that PEFT reads it.
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    trained = sum(each.numel() // (pooled if "lora_A" in name else 1) for name, each in adapter.items())
    merged = run.with_name("merged")
    export.merge(run, merged)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).to(device)
    rows = Rows(recipe(method, 1e-4, STAGES["final"], str(run.with_name("rows"))))
    found: Row = {"adapter_parameters": trained, "merged": rows.loss(model)}
    if pooled == 1:
        found |= {f"{fit} {bits}": rounded_loss(model, rows, fit, bits) for fit in ("rtn", "gptq") for bits in _BITS}
    return found


def rounded_loss(model: Any, rows: Rows, fit: str, bits: int) -> float:
    """Return the loss of a copy of a model with its linear layers in few bits."""
    from ftune.quantized.calibration import quantise_sequentially
    from ftune.quantized.minmax import fit_minmax
    from ftune.quantized.model import linear_layers, quantise
    from ftune.rotation.units import blocks_of

    model = copy.deepcopy(model)
    names = list(linear_layers(model))
    if fit == "rtn":
        quantise(model, names, lambda weight: fit_minmax(weight, bits, _GROUP))
    else:
        quantise_sequentially(
            model,
            blocks_of(model),
            names,
            rows.calibration(model.device),
            bits=bits,
            group_size=_GROUP,
            say=lambda _: None,
        )
    return rows.loss(model)


class Rows:
    """The rows of a run as its model reads them."""

    def __init__(self, values: dict[str, Any]) -> None:
        from ftune.data.collate import Collator
        from ftune.machine import probe
        from ftune.models.load import load_tokenizer
        from ftune.resolve import examine, resolve
        from ftune.training.loading import load_rows

        loaded, _ = examine(values, (), probe())
        assert loaded is not None
        spec = resolve(loaded, probe())
        tokenizer = load_tokenizer(spec.recipe.model, lambda _: None)
        self._spec, self._data = spec, load_rows(spec, tokenizer)
        self._eval = self._data.eval
        self._collate = Collator(tokenizer.pad_token_id)

    def calibration(self, device: Any) -> Any:
        from ftune.training.loading import batches_to_look_at

        return batches_to_look_at(self._spec, self._data, self._collate, device)(_CALIBRATION_ROWS, rows=1)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Return the mean loss over all learned tokens of the evaluation rows."""
        total, tokens = 0.0, 0
        for start in range(0, len(self._eval), 32):
            rows = [self._eval[number] for number in range(start, min(start + 32, len(self._eval)))]
            batch = {name: values.to(model.device) for name, values in self._collate(rows).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model.eval()(**batch, use_cache=False).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            tokens += int((labels != -100).sum())
        return total / tokens


def table(compared: Comparison) -> str:
    """Return the Markdown table of what has been measured, each method at its best rate."""
    lines = []
    for method in METHODS:
        final, cost = compared.found("final", method.name), compared.found("cost", method.name)
        if not final or not cost:
            continue
        what = f"{final['rate']:g} | {final['adapter_parameters']:,} | {cost['live_peak_bytes'] / 1e6:,.0f}"
        what += f" | {final['eval_loss']:.3f}"
        if "rtn 4" not in final:
            own = int(method.name.split()[-2])
            cells = [f"{final['merged']:.3f}" if bits == own else "" for bits in _BITS]
            lines.append(f"| {method.name} | {what} | {' | '.join(cells)} |")
            continue
        lines.append(f"| {method.name} | {what} | | | |")
        for fit, said in (("rtn", "rounded to nearest"), ("gptq", "GPTQ")):
            cells = [f"{final[f'{fit} {bits}']:.3f}" for bits in _BITS]
            lines.append(f"| {method.name}, merged, then {said} | | | | | {' | '.join(cells)} |")
    head = "| method | best rate | adapter's numbers | live peak, MB | loss as trained | 4 bits | 3 bits | 2 bits |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    Comparison(__file__, METHODS, finish=finish).main(__doc__ or "", table)
