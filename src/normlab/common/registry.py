"""Classes that are chosen by name: `@register` and `option` declare the names and options, once, on the class.

Such classes live in modules that import torch. `declarations` reads from their source what they declare, so that the
schema of a run and the report know it without importing them.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from normlab.common.errors import UserError, as_typed, nearest, not_one_of, switch_meant

_Class = TypeVar("_Class", bound=type)
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Option:
    """One option of a class, and the values that it can have.

    Attributes:
        default: a bool, int, float or str; values are of its type (an int is a float, too). Or a tuple of floats, for a
            list of at least one, of which each keeps the bounds.
        choices: the only values, if there are any.
        gt, ge, lt, le: bounds of a number. `ge` may be the name of an option that is declared before this one.
        unit: the name of the option, declared before, that says whether this one is a "fraction" of the run, which is
            1 at most, or a number of "steps".
        names: whether a list of names can take the place of a number, which is 1 or more.
        neutral: of an option that came after runs had been recorded, the value that they stand for (`runs.identity`).
            None: they are runs of another method, which no value is.
    """

    default: Any
    choices: tuple[Any, ...] = ()
    gt: float | None = None
    ge: float | str | None = None
    lt: float | None = None
    le: float | None = None
    unit: str | None = None
    names: bool = False
    neutral: Any = None

    def check(self, path: str, value: Any, others: Mapping[str, Any]) -> Any:
        """Return `value` in its one spelling, e.g. 1.0 for 1 and for the text "1" if the default is a float.

        Args:
            path: the option's name in messages, e.g. "norm.eps".
            value: the value to check.
            others: the values of the options that are declared before.

        Raises:
            UserError: if the option cannot have this value.
        """
        if self.choices or isinstance(self.default, bool):
            return self._check_choice(path, value)
        if self.names:
            return self._check_number_or_names(path, value)
        if isinstance(self.default, str):
            return value if isinstance(value, str) else _refuse(path, value, "text")
        if isinstance(self.default, tuple):
            if not isinstance(value, list | tuple) or not value:
                _refuse(path, value, "a list, e.g. [0.5,0.75]")
            return [self._check_number(f"{path}.{i}", one, others) for i, one in enumerate(value)]
        return self._check_number(path, value, others)

    def _check_number(self, path: str, value: Any, others: Mapping[str, Any]) -> float:
        whole = isinstance(self.default, int)
        convert: Callable[[Any], float] = _whole if whole else float
        kind = "a whole number" if whole else "a number"
        if isinstance(value, bool) or not isinstance(value, Real | str):
            _refuse(path, value, kind)
        try:
            number = convert(value)
        except (TypeError, ValueError, OverflowError):
            _refuse(path, value, kind)
        if not abs(number) < math.inf:
            _refuse(path, value, "a finite number")
        low = others[self.ge] if isinstance(self.ge, str) else self.ge
        high = 1 if self.unit and others[self.unit] == "fraction" else self.le
        bounds = (
            (operator.ge, low, "{} or more"),
            (operator.gt, self.gt, "a number above {}"),
            (operator.le, high, "{} or less"),
            (operator.lt, self.lt, "a number below {}"),
        )
        for holds, bound, text in bounds:
            if bound is None or holds(number, bound):
                continue
            shown = _without_zero(bound)
            expected = text.format(shown)
            if high and self.unit:
                expected = f"{_without_zero(low or 0)} to 1, a fraction of the run"
            closest = f" Nearest valid: {path}={shown}." if holds in (operator.ge, operator.le) else ""
            raise UserError(f"{path}={as_typed(value)} is out of range: expected {expected}.{closest}")
        return number

    def _check_number_or_names(self, path: str, value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        raise UserError(
            f"{path}={as_typed(value)} is neither a number of {path.rpartition('.')[2]}, 1 or more, nor a list of their"
            f" names.\nUse e.g. {path}=5 or {path}=[conv1,fc]."
        )

    def _check_choice(self, path: str, value: Any) -> Any:
        choices = self.choices or (True, False)
        for choice in choices:
            if isinstance(value, bool) == isinstance(choice, bool) and (value == choice or str(value) == str(choice)):
                return choice
            if isinstance(choice, bool) and isinstance(value, str) and value.lower() == str(choice).lower():
                return choice
        if not self.choices:
            raise UserError(
                f"{path}={as_typed(value)} is not valid: expected true or false.{switch_meant(path, value)}"
            )
        raise UserError(not_one_of(path, value, map(str, self.choices)))


def _refuse(path: str, value: Any, expected: str) -> NoReturn:
    raise UserError(f"{path}={as_typed(value)} is not valid: expected {expected}.")


def _whole(value: Any) -> int:
    """Return a whole number that may come as text or as 1e2; anything else raises TypeError or ValueError."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) else operator.index(value)


def _without_zero(number: float) -> str:
    """All digits of a number, but 1 for 1.0."""
    return str(number).removesuffix(".0")


def option(default: Any, **values: Any) -> Any:
    """Declare an `Option` in the body of a class.

    As in ``eps: float = option(1e-5, gt=0)``, which a type checker takes for a float.
    """
    return Option(default, **values)


def options_of(owner: type) -> dict[str, Option]:
    """Return the options of a class by name, those of its base classes first."""
    names = dict.fromkeys(name for base in reversed(owner.__mro__) for name in vars(base))
    return {name: value for name in names if isinstance(value := getattr(owner, name, None), Option)}


def refuse_unknown(owner: str, options: Mapping[str, Option], given: Iterable[str]) -> None:
    """Refuse a name in `given` that is none of the options of `owner`.

    Raises:
        UserError: for the first of them, with the nearest option that there is.
    """
    for name in given:
        if name not in options:
            close = nearest(name, options)
            raise UserError(
                f"{owner} has no option {name}.{f' Did you mean {close}?' if close else ''}\n"
                f"Expected {'one of: ' + ', '.join(options) if options else 'none'}."
            )


def check_options(section: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with each of the `options` in it checked.

    Raises:
        UserError: for the first that is wrong, by its name in `section` of a configuration.
    """
    values = {name: option.default for name, option in options.items()} | dict(given)
    for name, option in options.items():
        values[name] = option.check(f"{section}.{name}", values[name], values)
    return {name: values[name] for name in given}


@dataclass(frozen=True)
class Declaration:
    """One name for a class, as `register` is given it.

    Attributes:
        options: with the defaults of this name.
        aliases: what else it is called, for the hint in the error for an unknown name.
        family: the group that figures show it in.
        order: its place in tables and figures, counted over all families.
        needs: a setting beside the class without which it is not what the name says.
        formula, source, over, parameters, conv, use, cost: of a norm, its row in docs/variants.md, as the top of that
            page explains them; `conv` where it needs a convolution. scripts/variants.py makes the page.
        reconstruction: whether the paper leaves open what a norm does, so that this is our reading of it.
    """

    name: str
    class_name: str
    options: Mapping[str, Option]
    aliases: tuple[str, ...] = ()
    family: str = ""
    order: int = 1000
    needs: str = ""
    formula: str = ""
    source: str = ""
    over: str = ""
    parameters: str = ""
    conv: str = ""
    use: str = ""
    cost: str = ""
    reconstruction: bool = False

    def defaults(self) -> dict[str, Any]:
        """Return the default of each option."""
        return {name: option.default for name, option in self.options.items()}


_registered: dict[type, list[Declaration]] = {}


def register(name: str, *, defaults: Mapping[str, Any] | None = None, **details: Any) -> Callable[[_Class], _Class]:
    """Decorate a class with a name; several give it several. All arguments are literals, for `declarations` to read.

    Args:
        name: of its YAML file.
        defaults: of options whose default is another one under this name.
        details: the other attributes of its `Declaration`.
    """

    def decorate(cls: _Class) -> _Class:
        options = options_of(cls)
        options |= {key: replace(options[key], default=value) for key, value in (defaults or {}).items()}
        _registered.setdefault(cls, []).append(Declaration(name, cls.__name__, options, **details))
        return cls

    return decorate


def registered(kind: type[_Kind]) -> dict[str, tuple[type[_Kind], Declaration]]:
    """Return the classes derived from `kind` that are registered so far, each with its declaration, by name."""
    return {each.name: (cls, each) for cls, own in _registered.items() if issubclass(cls, kind) for each in own}


@cache
def declarations(package: str) -> dict[str, Declaration]:
    """Return what the source of `normlab.<package>` registers, by name and in `order`, without importing it.

    Raises:
        ValueError: if a declaration is made of anything but literals.
    """
    files = sorted((Path(__file__).parents[1] / package).glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    declaring = (text for text in texts if "option(" in text or "@register(" in text)  # parsing the others takes time
    body = [node for text in declaring for node in ast.parse(text).body]
    nodes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}

    @cache
    def stand_in(name: str) -> type:
        """A class with the options of the real one, derived from stand-ins of its base classes in this package."""
        bases = tuple(
            stand_in(base.id) for base in nodes[name].bases if isinstance(base, ast.Name) and base.id in nodes
        )
        return type(name, bases, dict(map(_assigned, nodes[name].body)))

    for name, node in nodes.items():
        for decorator in reversed(node.decorator_list):
            if _called(decorator) == "register":
                _evaluated(decorator)(stand_in(name))
    found = [each for name in nodes for each in _registered.pop(stand_in(name), ())]
    return {each.name: each for each in sorted(found, key=lambda each: each.order)}


def _assigned(statement: ast.stmt) -> tuple[str, Any]:
    """The name that a statement of a class's body gives a value to, and the option that this is, if it is one."""
    target = getattr(statement, "target", None) or getattr(statement, "targets", [None])[0]
    value = getattr(statement, "value", None)
    return getattr(target, "id", ""), _evaluated(value) if _called(value) == "option" else None


def _called(node: Any) -> str:
    """The name of the function that an expression calls, or nothing."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _evaluated(node: Any) -> Any:
    functions: dict[str, Callable[..., Any]] = {"option": option, "register": register}
    if _called(node) not in functions:
        return ast.literal_eval(node)
    keywords = {keyword.arg: _evaluated(keyword.value) for keyword in node.keywords}
    return functions[_called(node)](*map(_evaluated, node.args), **keywords)
