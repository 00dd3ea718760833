"""Every optimizer and way of tuning on SmolLM2-135M and the shipped rows: loss after 200 steps, memory, time of a step.

    python benchmarks/optimizers.py search [--jobs 2]    the best rate of each, by the loss after 40 steps
    python benchmarks/optimizers.py final [--jobs 2]     200 steps of each at its best rate
    python benchmarks/optimizers.py cost                 time of a step and live bytes; on an idle machine
    python benchmarks/optimizers.py table

Every run is a process of its own and starts from the same weights and rows: 2 rows of at most 64 tokens a step,
float32 unless said, a linear schedule with a tenth of warmup. A method that computes the same numbers as another, as
the tests show, takes that one's rate. Live bytes are those of two steps, each tensor counted from its first use
until it is freed. What was measured is kept in results/optimizers.jsonl.
"""

from __future__ import annotations

from rates import Comparison, Method


def optimizer(name: str, rate: float = 0.0, like: str = "") -> Method:
    return Method(name, rate, like, {"optim": name})


METHODS = (
    optimizer("adamw_torch", 1e-4),
    optimizer("adamw_8bit", 1e-4),
    optimizer("adafactor", 1e-4),
    optimizer("lion_8bit", 3e-5),
    optimizer("muon", 3e-4),
    optimizer("schedule_free_adamw", 3e-4),
    optimizer("galore_adamw", 3e-4),
    optimizer("apollo_adamw", 3e-4),
    optimizer("sgd", 3e-2),
    optimizer("lomo", like="sgd"),
    optimizer("adalomo", 1e-3),
    Method("adalomo, bfloat16 weights", like="adalomo", training={"optim": "adalomo"}, model={"dtype": "bfloat16"}),
    optimizer("adamw_fused_backward", like="adamw_torch"),
    optimizer("adafactor_fused_backward", like="adafactor"),
    Method("hift", 3e-4, tuning={"method": "hift"}),
    Method("lisa", 1e-4, tuning={"method": "lisa"}),
    Method("badam", 1e-4, tuning={"method": "badam", "interval": 50}),
    Method("lora", 1e-3, tuning={"method": "lora"}),
    optimizer("mezo", 1e-6),
    optimizer("sparse_mezo", 1e-4),
)


def table(compared: Comparison) -> str:
    """Return the Markdown table of what has been measured, each method at its best rate."""
    base, lines = compared.found("final", "adamw_torch"), []
    for method in METHODS:
        final, cost = compared.found("final", method.name), compared.found("cost", method.name)
        if final and cost and base:
            loss = final["eval_loss"]
            lines.append(
                f"| `{method.name}` | {final['rate']:g} | {loss:.3f} | {loss / base['eval_loss'] - 1:+.1%} "
                f"| {cost['live_peak_bytes'] / 1e6:,.0f} | {cost['step_seconds']:.2f} |"
            )
    head = "| method | best rate | evaluation loss | to AdamW | live peak, MB | seconds a step |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    Comparison(__file__, METHODS).main(__doc__ or "", table)
