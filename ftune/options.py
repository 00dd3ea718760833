"""The base of every settings model, and the scalar types a recipe is made of.

Pydantic's lax mode would read `true` as the number 1 and `no` as false. These types take what a person means and
nothing else: a quoted number counts where a number is wanted, a bool never does, and numbers are finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_LARGEST_INTEGER = 2**63 - 1
"""What PyTorch holds in an integer."""


class Options(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def _number(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("number", "expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise PydanticCustomError("number", "expected a finite number")
    return value


def _integer(value: Any) -> Any:
    try:
        number = _number(value)
    except PydanticCustomError:
        raise PydanticCustomError("integer", "expected a whole number") from None
    if number != int(number):
        raise PydanticCustomError("integer", "expected a whole number")
    # A quoted whole number is read as such: a float would round it above 2 ** 53.
    exact = int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else int(number)
    if abs(exact) > _LARGEST_INTEGER:
        raise PydanticCustomError("integer", "expected a whole number below 2 ** 63")
    return exact


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise PydanticCustomError("flag", "expected true or false")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "expected text")
    if not value.strip():
        raise PydanticCustomError("empty_text", "must be more than blanks")
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise PydanticCustomError("control_text", "must be one line of ordinary characters")
    return value


def _or_auto(check: Callable[[Any], Any], *, minimum: float | None = None) -> Callable[[Any], Any]:
    def validate(value: Any) -> Any:
        if isinstance(value, str) and value == "auto":
            return value
        try:
            checked = check(value)
        except PydanticCustomError as error:
            raise PydanticCustomError("or_auto", "{expected} or auto", {"expected": error.message()}) from None
        if minimum is not None and checked < minimum:
            raise PydanticCustomError("or_auto", "must be {minimum} or more, or auto", {"minimum": minimum})
        return checked

    return validate


Number = Annotated[float, BeforeValidator(_number)]
Integer = Annotated[int, BeforeValidator(_integer)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Text = Annotated[str, BeforeValidator(_text)]
"""One line of text that is not blank: a name, a path."""
NumberOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_or_auto(_number, minimum=0))]
"""No number of a recipe that may be `auto` can be negative."""
FlagOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_or_auto(_flag))]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0.0)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0.0)]


class AdamOptions(Options):
    """Options of Adam's family."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: NotNegative = 1e-8
    """Added to the denominator."""


class Adam8bitOptions(AdamOptions):
    """Options of Adam's family with states of one byte."""

    min_8bit_size: Integer = Field(default=4096, ge=1)
    """Tensors with fewer elements keep 32-bit states."""

    def state_bytes(self, elements: int, *, in_32_bits: bool) -> int:
        """Return the bytes of a tensor's two states, in 32 bits if asked."""
        return bytes_of_state(elements, states=2, in_32_bits=in_32_bits or elements < self.min_8bit_size)


class Lion8bitOptions(Options):
    """Options of Lion with a state of one byte."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Weight of the momentum in the update, and decay rate of the momentum."""
    min_8bit_size: Integer = Field(default=4096, ge=1)
    """Tensors with fewer elements keep a 32-bit state."""

    def state_bytes(self, elements: int, *, in_32_bits: bool) -> int:
        """Return the bytes of a tensor's state, in 32 bits if asked."""
        return bytes_of_state(elements, states=1, in_32_bits=in_32_bits or elements < self.min_8bit_size)


def bytes_of_state(elements: int, *, states: int, in_32_bits: bool) -> int:
    """Return the bytes of bitsandbytes' states of a tensor: one an element, and a float32 scale for each block."""
    return states * 4 * elements if in_32_bits else states * (elements + 4 * math.ceil(elements / BLOCK))


BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit states."""


class FactoredOptions(Options):
    """Options of Adafactor's family."""

    eps: tuple[NotNegative, NotNegative] = (1e-30, 1e-3)
    """Added to the squared gradient, and the floor of the weights' own scale."""
    clip_threshold: Positive = 1.0
    """Largest root mean square of one tensor's update; what takes the place of clipping the gradient norm."""
    decay_rate: Number = Field(default=-0.8, lt=0)
    """Exponent of step in the second moment's decay: 1 - step ** decay_rate."""

    def statistics_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor's second moment: float32 for each row and column of its matrices."""
        if len(shape) < 2:
            return 4 * math.prod(shape)
        *leading, rows, columns = shape
        return 4 * math.prod(leading) * (rows + columns)


class AdapterRate(Options):
    """Options of an optimizer that moves an adapter beside trained weights by AdamW."""

    adapter_learning_rate: Positive = 2e-4
    """Peak rate of AdamW on the adapter, where the tuning trains one beside the weights; learning_rate is theirs."""

    adapter_state_bytes_per_parameter: ClassVar[float] = 8.0
    """AdamW's two running means of an adapter's weight, in float32."""


class FusedOptions(Options):
    """Options of every update that is made inside backward."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How results become bfloat16 weights: by chance, so that small updates count on average, or to the nearest."""
    accumulate: Literal["forward", "buffer"] | None = None
    """What gradient_accumulation_steps above 1 does: `forward` keeps the graphs of all micro-batches (set
    gradient_checkpointing, so that they are small) and runs one backward over them; `buffer` adds gradients up."""
    buffer: Literal["bfloat16", "host"] = "bfloat16"
    """Where `accumulate: buffer` adds up: 2 bytes per weight on the device, or 4 in the memory of the host."""
    clip_grad_value: Positive | None = None
    """Limit of each element of a gradient; needs no second backward."""
    clip_grad_norm_per_tensor: Positive | None = None
    """Limit of the norm of each tensor's gradient by itself; needs no second backward."""
