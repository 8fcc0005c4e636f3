"""Port: what the configuration files of both daemons are made of: sections, sizes, seconds, and a look for things used twice."""

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

_SIZE: Final = re.compile(r"(\d{1,18})\s*(B|KiB|MiB|GiB)?")
_UNITS: Final = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _parse_size(value: object) -> object:
    """Bytes from a number or from text such as "64MiB"; whatever is neither is pydantic's to refuse."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError('expected a number of bytes, or a size such as "64MiB" (B, KiB, MiB, GiB)')
    return int(found[1]) * _UNITS[found[2]]


Size = Annotated[int, BeforeValidator(_parse_size)]
"""Bytes, written as a number or with a unit."""
Seconds = Annotated[float, Field(allow_inf_nan=False)]
"""A span of time; finite."""


class Section(BaseModel):
    """What all parts have in common: nothing unknown is accepted, nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ResumeSettings(Section):
    """Carrying streams over a cut of the tunnel."""

    enabled: bool = Field(True, description="Whether cut data links are continued; if not, their streams end in RST.")
    hold_s: Seconds = Field(
        30.0, ge=0, le=3_600, description="Seconds a relay has to come back before its streams are reset; the other end may say less."
    )
    replay_bytes: Size = Field(16 << 20, ge=1 << 20, le=1 << 30, description="Unacknowledged bytes kept per data link for a repeat.")


class LogSettings(Section):
    """What is logged, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is logged.")
    style: Literal["auto", "json", "text"] = Field("auto", description="One JSON object a line, or text; auto: text on a terminal.")


class WholeFile(Section):
    """All sections of a file. What is used twice is reported together with whatever else is wrong."""

    @classmethod
    def find_clashes(cls, raw: Mapping[str, object]) -> list[InitErrorDetails]:
        """A `clash` for everything that stands twice in `raw`, which nobody has checked yet. Override it."""
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _check_clashes(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A validator of the finished model would be simpler, but pydantic calls it only when all the rest is right."""
        clashes = cls.find_clashes(value) if isinstance(value, dict) else []
        if isinstance(value, dict):
            value = {**cls._left_out(value), **value}
        if not clashes:
            return handler(value)
        try:
            handler(value)
        except ValidationError as exc:
            clashes = [*_details(exc), *clashes]
        raise ValidationError.from_exception_data(cls.__name__, clashes)

    @classmethod
    def _left_out(cls, raw: Mapping[str, object]) -> dict[str, object]:
        """Sections that are not written, empty: made by their factories they would not know the file's directory, to which paths that
        are defaults are relative as well.
        """
        sections = {name: info.default_factory for name, info in cls.model_fields.items() if name not in raw}
        return {name: {} for name, factory in sections.items() if isinstance(factory, type) and issubclass(factory, Section)}


def clash(message: str, loc: tuple[str | int, ...], value: str) -> InitErrorDetails:
    """The error that `value` at `loc` was used before, as `message` says."""
    return InitErrorDetails(type=PydanticCustomError("clash", message), loc=loc, input=value)


def tables(raw: Mapping[str, object], name: str) -> list[tuple[int, Mapping[str, object]]]:
    """The entries of the array of tables `name` with their places; what is no table is left out."""
    entries = raw.get(name)
    return [(index, entry) for index, entry in enumerate(entries if isinstance(entries, list) else []) if isinstance(entry, dict)]


def _details(exc: ValidationError) -> list[InitErrorDetails]:
    """The errors of `exc`, to be raised again among others. The texts are final: pydantic formats no custom error without context."""
    return [
        InitErrorDetails(type=PydanticCustomError(error["type"], error["msg"]), loc=error["loc"], input=error["input"])
        for error in exc.errors(include_url=False)
    ]
