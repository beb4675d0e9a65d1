"""Failed checks of pydantic as sentences for a user."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails, PydanticCustomError

from normlab.common.errors import as_typed, did_you_mean, not_one_of, switch_meant

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, e.g. [0.5,0.75]",
    "finite_number": "a finite number",
    "model_type": "settings, {name: value}",
    "model_attributes_type": "settings, {name: value}",
    "dict_type": "settings, {name: value}",
}
_BOUNDS = {
    "greater_than": "a number above {}",
    "greater_than_equal": "{} or more",
    "less_than": "a number below {}",
    "less_than_equal": "{} or less",
}


def wrong(text: str) -> PydanticCustomError:
    """Return the error of a failed check whose text is already a sentence for the user."""
    return PydanticCustomError("sentence", text)


def sentence(
    error: ErrorDetails,
    values: Mapping[str, Any],
    known: Iterable[str] = (),
    examples: Mapping[str, Any] | None = None,
) -> str:
    """Return one pydantic error as a message for the user, of at most five lines.

    Args:
        error: one of `ValidationError.errors()`.
        values: the values that were validated.
        known: dotted paths of the settings that exist, from which the nearest is proposed.
        examples: valid values by dotted path.
    """
    path = _dotted(error["loc"], values)
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    shown = f"{path}={as_typed(value)}"
    match kind:
        case "sentence":
            return error["msg"]
        case "missing":
            return f"The setting {path} is missing.\nGive it a value: {path}=..."
        case "extra_forbidden":
            return f"{path}: there is no such setting.{did_you_mean(path, known, after='=...')}"
        case "union_tag_invalid":
            return not_one_of(f"{path}.{context['discriminator'].strip(chr(39))}", context["tag"], _choices(context))
        case "literal_error":
            return not_one_of(path, value, _choices(context))
        case "string_pattern_mismatch":
            return f"{shown} is not valid: use letters, digits, '_', '-', '+' and '.', starting with a letter or digit."
        case "string_too_short":
            return f"{path}= is empty.\nGive it a value: {path}=..."
    if kind in _EXPECTED:
        problem = f"{shown} is empty" if value == "" else f"{shown} is not valid"
        return f"{problem}: expected {_EXPECTED[kind]}.{_hint(path, value, kind, examples or {})}"
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        nearest_valid = f" Nearest valid: {path}={bound}." if kind.endswith("equal") else ""
        return f"{shown} is out of range: expected {_BOUNDS[kind].format(bound)}.{nearest_valid}"
    return f"{shown} is not valid: {error['msg']}."


def _hint(path: str, value: Any, kind: str, examples: Mapping[str, Any]) -> str:
    """Return what was probably meant by a value of the wrong type, or an example; nothing where there is neither."""
    if kind == "bool_type":
        return switch_meant(path, value)
    if str(value).lower() == "none":
        return f"\nIf it is to have no value: {path}=null."
    if kind in ("int_type", "float_type") and isinstance(value, list) and value:
        return f"\nSeveral values make a sweep, without brackets: -m {path}={','.join(map(str, value))}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"\nQuotes make it text: \"{path}='{as_typed(value)}'\"."
    return f" Example: {path}={examples[path]}." if path in examples else ""


def _choices(context: Mapping[str, str]) -> list[str]:
    expected = context.get("expected_tags") or context["expected"]
    return [choice.strip("' ") for choice in expected.replace(" or ", ",").split(",")]


def _dotted(location: tuple[int | str, ...], values: Mapping[str, Any]) -> str:
    """Return a pydantic location without the tags of unions, which are no keys of the values."""
    path: list[str] = []
    node: Any = values
    for part in location:
        if isinstance(node, Mapping) and part not in node and path and part in node.values():
            continue
        path.append(str(part))
        node = node[part] if isinstance(node, Mapping) and part in node else None
    return ".".join(path)
