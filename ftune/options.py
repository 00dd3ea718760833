"""The base of every settings model, and the scalar types a recipe is made of.

Pydantic's lax mode would read `true` as the number 1 and `no` as false. These types take what a person means and
nothing else: a quoted number counts where a number is wanted, a bool never does.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


class Options(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _number(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("number", "expected a number")
    return value


def _integer(value: Any) -> Any:
    number = value
    if not isinstance(value, bool) and not isinstance(value, int):
        try:
            number = _number(value)
        except PydanticCustomError:
            raise PydanticCustomError("integer", "expected a whole number") from None
    if isinstance(number, bool) or number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise PydanticCustomError("integer", "expected a whole number")
    return int(number)


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise PydanticCustomError("flag", "expected true or false")
    return value


def _or_auto(check: Any) -> Any:
    def validate(value: Any) -> Any:
        if value == "auto" and not isinstance(value, bool):
            return value
        try:
            return check(value)
        except PydanticCustomError as error:
            raise PydanticCustomError(error.type + "_or_auto", error.message_template + " or auto") from None  # type: ignore[arg-type]

    return validate


Number = Annotated[float, BeforeValidator(_number)]
Integer = Annotated[int, BeforeValidator(_integer)]
Flag = Annotated[bool, BeforeValidator(_flag)]
NumberOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_or_auto(_number))]
IntegerOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_or_auto(_integer))]
FlagOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_or_auto(_flag))]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0)]
