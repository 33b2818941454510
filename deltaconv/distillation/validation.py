"""Constrained types for settings and saved states, and pydantic's errors as sentences."""

from typing import Annotated, TypeAlias

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

# Neither a bool nor text is a number; an int is a float.
Int: TypeAlias = Annotated[int, Field(strict=True)]
Float: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count: TypeAlias = Annotated[Int, Field(ge=0)]
Bool: TypeAlias = Annotated[bool, Field(strict=True)]
Share: TypeAlias = Annotated[Float, Field(ge=0, le=1)]

# What pydantic calls by the names of Python's types.
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dataclass_type": "entries by name",
    "mapping_type": "entries by name",
    "dict_type": "entries by name",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(error: ValidationError) -> list[str]:
    """One sentence per problem: "name: expected …, got …", or "unknown: name"."""
    return [_problem(problem) for problem in error.errors(include_url=False)]


def _problem(problem: ErrorDetails) -> str:
    # pydantic marks the key of a mapping, whose name stands before it.
    name = ".".join(f"{part!s:.40}" for part in problem["loc"] if part != "[key]")
    kind = problem["type"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return f"unknown: {name}"
    expected = f"expected {_KINDS[kind]}" if kind in _KINDS else problem["msg"]
    expected = expected.replace("Input should be ", "expected ", 1)
    if kind in _BOUNDS and "ctx" in problem:
        key, bound = _BOUNDS[kind]
        expected = f"expected a number, {bound} {problem['ctx'][key]:g}"
    return f"{name}: {expected}, got {problem['input']!r:.40}"
