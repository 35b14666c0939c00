"""What a chat template may do: jinja2's immutable sandbox, narrowed and paid from a budget.

A template is a program that came with a model's files. It sees no Python object but the messages
and calls nothing but what is listed here. Whatever it makes is charged before or as it is made, and
no single operation takes long on what the budget allows; so between two lines the deadline can be
checked, and that bounds the time. Page: docs/http-api.md, "Templates".
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import Undefined, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jinja2.compiler import Frame
    from jinja2.parser import Parser
    from jinja2.runtime import Context

T = TypeVar("T")

VALUE_SIZE_MAX = 4 * 1024 * 1024
"""Largest value a template may make, in characters: twice the largest request body."""

SIZE_IN_ALL_MAX = 16 * VALUE_SIZE_MAX
"""All that one rendering may make, in characters. At up to four bytes each: 256 MiB."""

ITEM_SIZE = 16
"""What one item of a list or dict counts as: about the memory of the object behind it."""

RANGE_MAX = 10_000
"""Longest `range`; real loops run over messages, which are bounded themselves."""

INTEGER_BITS_MAX = 256
"""Largest factor, base or exponent: templates count messages."""

DIGITS_MAX = 100
"""Longest text that is read as a number."""

_PLAIN_FILTERS = """
    abs count d default dictsort first groupby items last length list map max min reject
    rejectattr reverse select selectattr sort unique
"""
# These make at most what they are given.

_TEXT_FILTERS = "capitalize float lower title trim upper"
# These first make a text of what they are given.

_TEXT_METHODS = """
    capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""

_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}
"""Methods of built-in types that may be called; none makes much more than it is given."""

_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{3})")
"""A printf width or precision that would make a long text of nothing."""

_SAFE_DATE = re.compile(r"(?:[^%]|%-?[aAbBcdHIjmMpSUwWxXyYzZ%])*")
"""Date formats without widths, which the C library pads without bound."""


class BudgetExceeded(BaseException):
    """A rendering passed its bounds. Not an Exception, so that nothing on the way swallows it."""


class RefusedByTemplate(Exception):
    """What a template's `raise_exception` raises."""


class Budget:
    """What one rendering may still make."""

    def __init__(self) -> None:
        self._left = SIZE_IN_ALL_MAX

    def charge(self, size: int) -> None:
        """Take `size` characters off the budget.

        Raises:
            BudgetExceeded: Too many at once, or in all.
        """
        self._left -= size
        if size > VALUE_SIZE_MAX or self._left < 0:
            raise BudgetExceeded(f"it makes more than {VALUE_SIZE_MAX} characters")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates, each rendering on a budget of its own."""

    code_generator_class: type[CodeGenerator]
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, strftime: Callable[[str], str]) -> None:
        """Args: strftime: Formats the present time, for templates that tell the model the date."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            cache_size=0,
            finalize=self.text,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self._spending = local()
        known = self.filters
        self.filters = {name: self._paid(known[name]) for name in _PLAIN_FILTERS.split()}
        self.filters |= {name: self._paid_text(known[name]) for name in _TEXT_FILTERS.split()}
        self.filters |= {
            "indent": self._indent,
            "int": _int,
            "join": self._join,
            "replace": self._replace,
            "round": _round,
            "safe": self.text,
            "string": self.text,
            "sum": _sum,
            "tojson": self._tojson,
        }
        self.globals = {
            "dict": dict,
            "namespace": self.globals["namespace"],
            "range": _range,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: _date(strftime, pattern),
        }

    @contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Charge what this thread's template makes to `budget`."""
        self._spending.budget = budget
        try:
            yield
        finally:
            del self._spending.budget

    def charge(self, size: int) -> None:
        """Charge what is about to be made."""
        budget: Budget = self._spending.budget
        budget.charge(size)

    def charged(self, value: T) -> T:
        """Charge a value that was made, and return it.

        A container is small itself but is compared and printed with all it holds, once for every
        way that leads there: so all that counts against the bound of one value.
        """
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.charge(ITEM_SIZE * len(value))
            _check_deep(value)
        return value

    def text(self, value: object) -> str:
        """Return a value as the text it is printed as; refuses what only Python could print."""
        if isinstance(value, str):
            return str(value)
        if isinstance(value, (list, tuple, dict)):
            _check_deep(value, only_plain=True)
        elif not isinstance(value, (int, float, Undefined, type(None))):
            raise SecurityError(f"a template may not print a {type(value).__name__}")
        return self.charged(str(value))

    def concatenated(self, parts: Iterable[object]) -> str:
        """Join what `~` stands between."""
        return self._joined("", [self.text(part) for part in parts])

    @property
    def concat(self) -> Callable[[Iterable[str]], str]:  # type: ignore[override]
        """Joins what a block, macro or captured `set` printed."""
        return lambda parts: self._joined("", list(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result may be far larger than its operands, if it is not."""
        match operator:
            case "+" if isinstance(left, (str, list, tuple)):
                self.charge(len(left) + len(right))
            case "*":
                self._check_product(left, right)
            case "**" if not (_is_small(left) and _is_small(right) and abs(right) <= 256):
                raise SecurityError("a template may not make such large numbers")
            case "%" if isinstance(left, str):
                self._check_format(left, right)
        return self.charged(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                self.charge(len(sequence) * max(count, 0))
                return
        if not (_is_small(left) and _is_small(right)):
            raise SecurityError("a template may not make such large numbers")

    def _check_format(self, pattern: str, values: object) -> None:
        if _WIDE_FORMAT.search(pattern):
            raise SecurityError("a template may not format with such a width")
        shown = values if isinstance(values, tuple) else (values,)
        self.charge(pattern.count("%") * max((len(self.text(value)) for value in shown), default=0))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, if it may; what it passes must be within bounds."""
        _check_deep((args, kwargs))
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, str):
            __self._check_method(owner, __obj.__name__, args)
        return __self.charged(super().call(__context, __obj, *args, **kwargs))

    def _check_method(self, owner: object, name: str, args: tuple[Any, ...]) -> None:
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is None or name not in _METHODS[kind]:
            raise SecurityError(f"a template may not call {type(owner).__name__}.{name}")
        if isinstance(owner, str):
            self.charge(len(owner))
            if name == "replace":
                self._check_replace(owner, *args[:2])
            elif name == "join":
                if not isinstance(args[0], (list, tuple)):
                    raise SecurityError("a template may join lists only")
                self.charge(sum(len(part) + len(owner) for part in args[0]))

    def _check_replace(self, text: str, old: str, new: str) -> None:
        self.charge(len(text) + text.count(old) * len(new))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse `str.format`, whose widths make texts of any length."""
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and value.__name__ in ("format", "format_map"):
            return _refuse_format
        return None

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Charge a filter's result; keep how jinja2 passes its arguments."""

        def paid(*args: Any, **kwargs: Any) -> Any:
            return self.charged(function(*args, **kwargs))

        if hasattr(function, "jinja_pass_arg"):
            paid.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return paid

    def _paid_text(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def paid(value: object, *args: Any, **kwargs: Any) -> Any:
            return self.charged(function(self.text(value), *args, **kwargs))

        return paid

    def _joined(self, separator: str, parts: Sequence[str]) -> str:
        self.charge(sum(map(len, parts)) + len(separator) * len(parts))
        return separator.join(parts)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        return self._joined(self.text(d), [self.text(value) for value in values])

    def _replace(self, value: object, old: str, new: str, count: int | None = None) -> str:
        text, old, new = self.text(value), self.text(old), self.text(new)
        self._check_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _indent(
        self, value: object, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        prefix = width if isinstance(width, str) else " " * min(max(width, 0), 64)
        lines = self.text(value).split("\n")
        self.charge(sum(map(len, lines)) + len(lines) * (len(prefix) + 1))
        return "\n".join(
            prefix + line if (line or blank) and (number or first) else line
            for number, line in enumerate(lines)
        )

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As chat templates expect it: not escaped for HTML."""
        if not isinstance(value, str):
            self.text(value)
        return self.charged(
            json.dumps(
                value,
                ensure_ascii=ensure_ascii,
                indent=None if indent is None else min(max(indent, 0), 16),
                separators=separators,
                sort_keys=sort_keys,
            )
        )


class _CodeGenerator(CodeGenerator):
    """Leads the operations that jinja2's sandbox has no hook for through the budget."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._charged(isinstance(node.arg, nodes.Slice), super().visit_Getitem, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._charged(True, super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._charged(True, super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._charged(node.ctx == "load", super().visit_Tuple, node, frame)

    def _charged(
        self, is_value: bool, visit: Callable[..., None], node: nodes.Node, frame: Frame
    ) -> None:
        if is_value:
            self.write("environment.charged(")
        visit(node, frame)
        if is_value:
            self.write(")")


TemplateEnvironment.code_generator_class = _CodeGenerator


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_deep(value: object, *, only_plain: bool = False) -> None:
    """Check a value with all it holds, counted once for every way that leads there."""
    size = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, (list, tuple, dict)):
            size += ITEM_SIZE * len(item)
            if isinstance(item, dict):
                waiting.extend(item.values())
            waiting.extend(item)
        elif only_plain and not isinstance(item, (int, float, Undefined, type(None))):
            raise SecurityError(f"a template may not print a {type(item).__name__}")
        if size > VALUE_SIZE_MAX:
            raise BudgetExceeded(f"it makes a value of more than {VALUE_SIZE_MAX} characters")


def _is_small(value: object) -> bool:
    return not isinstance(value, int) or value.bit_length() <= INTEGER_BITS_MAX


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > RANGE_MAX:
        raise OverflowError(f"a template's range may have {RANGE_MAX} numbers")
    return numbers


def _int(value: object, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str):
        try:
            return int(value, base) if len(value) <= DIGITS_MAX else default
        except ValueError:
            return default
    return int(value) if isinstance(value, (int, float)) else default


def _round(value: float, precision: int = 0) -> float:
    return round(value, min(max(precision, 0), 15))


def _sum(values: Iterable[Any], attribute: str | None = None, start: float = 0) -> float:
    total = start
    for value in values:
        number = value.get(attribute) if attribute is not None else value
        if not isinstance(number, (int, float)):
            raise SecurityError("a template may add up numbers only")
        total += number
    return total


def _raise_exception(message: object = "") -> None:
    raise RefusedByTemplate(str(message))


def _refuse_format(*_args: object, **_kwargs: object) -> str:
    raise SecurityError("a template may not call str.format")


def _date(strftime: Callable[[str], str], pattern: str) -> str:
    if len(pattern) > 64 or not _SAFE_DATE.fullmatch(pattern):
        raise SecurityError("a template may only use plain date formats")
    return strftime(pattern)
