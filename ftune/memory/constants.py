from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    least: int
    most: int


def context_bytes(gpu):
    return Span(450 * 1024**2, 700 * 1024**2)
