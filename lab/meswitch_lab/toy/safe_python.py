"""Run a small function that a language model wrote, without ever calling `exec`.

The answer is parsed and its syntax tree is interpreted here, so nothing it names can reach the real interpreter:
no attributes, imports, strings or builtins other than the six of `BUILTINS`. Every node costs one step of a
budget and every value is bounded in size, so an answer can neither hang the evaluation nor eat its memory.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

BUILTINS: dict[str, Callable[..., Any]] = {
    "sum": sum,
    "len": len,
    "max": max,
    "min": min,
    "sorted": sorted,
    "abs": abs,
}
MAX_SOURCE, MAX_STEPS, MAX_DEPTH = 4_000, 5_000, 32
MAX_NUMBER, MAX_EXPONENT, MAX_ITEMS = 10**18, 32, 1_000

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_Scope = dict[str, Any]
_SCALAR = (int, float, type(None))  # bool is an int
_NOTHING = object()  # a block ended without `return`


class RefusedError(Exception):
    """The source asks for something outside this small language, or for too much of it."""


# What a wrong but harmless answer may raise; the caller counts it as wrong.
FAILURES = (RefusedError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError)


def call_each(source: str, name: str, arguments: Sequence[list[int]]) -> list[Any]:
    """Define the functions of `source` and call the one named `name` on each argument, with fresh copies.

    Raises:
        RefusedError: not Python, no such function, or outside the language and the limits of this module.
        ArithmeticError, TypeError, ValueError, LookupError, RecursionError: what the answer itself raised.
    """
    functions = {definition.name: definition for definition in _parse(source)}
    if name not in functions:
        raise RefusedError(f"the answer defines no function {name!r}")
    return [_Run(functions).call(functions[name], [list(argument)]) for argument in arguments]


def _parse(source: str) -> list[ast.FunctionDef]:
    if len(source) > MAX_SOURCE:
        raise RefusedError(f"longer than {MAX_SOURCE} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1 is 1` and the like: not worth a line on the user's terminal
            body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedError(f"not Python: {error}") from None
    for statement in body:
        if not isinstance(statement, ast.FunctionDef) or statement.decorator_list or statement.returns:
            raise RefusedError("only plain function definitions are run")
        extra = statement.args
        if extra.vararg or extra.kwarg or extra.kwonlyargs or extra.posonlyargs or extra.defaults:
            raise RefusedError("only positional parameters without defaults")
        if any(parameter.annotation for parameter in extra.args):
            raise RefusedError("no annotations")
    return [statement for statement in body if isinstance(statement, ast.FunctionDef)]


def _bounded(value: Any) -> Any:
    """The value, if it is a number or a flat list or tuple of numbers within the limits.

    Flat, because comparing nested lists that share their parts can take exponential time.
    """
    items: Sequence[Any] = value if isinstance(value, list | tuple) else (value,)
    if len(items) > MAX_ITEMS:
        raise RefusedError(f"more than {MAX_ITEMS} items")
    for item in items:
        if not isinstance(item, _SCALAR) or (isinstance(item, int) and abs(item) > MAX_NUMBER):
            raise RefusedError(f"{type(item).__name__} values of this kind or size")
    return value


class _Run:
    """One call of one function: its step budget and the interpreter over the syntax tree."""

    def __init__(self, functions: dict[str, ast.FunctionDef]) -> None:
        self.functions = functions
        self.steps = 0
        self.depth = 0

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise RefusedError(f"more than {MAX_STEPS} steps")

    def call(self, function: ast.FunctionDef | ast.Lambda, arguments: list[Any], outer: _Scope | None = None) -> Any:
        parameters = [parameter.arg for parameter in function.args.args]
        if len(parameters) != len(arguments):
            raise TypeError(f"{len(parameters)} parameters, {len(arguments)} arguments")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RefusedError(f"more than {MAX_DEPTH} nested calls")
        scope = {**(outer or {}), **dict(zip(parameters, arguments, strict=True))}
        if isinstance(function, ast.Lambda):
            result = self.value(function.body, scope)
        else:
            result = self.block(function.body, scope)
        self.depth -= 1
        return None if result is _NOTHING else result

    def block(self, body: Iterable[ast.stmt], scope: _Scope) -> Any:
        """Run statements; what `return` gave, or `_NOTHING`."""
        for statement in body:
            self.spend()
            result = _NOTHING
            match statement:
                case ast.Return(value=expression):
                    return None if expression is None else self.value(expression, scope)
                case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                    scope[name] = self.value(expression, scope)
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=right):
                    scope[name] = self.binary(op, self.name(name, scope), self.value(right, scope))
                case ast.If(test=test, body=then, orelse=otherwise):
                    result = self.block(then if self.value(test, scope) else otherwise, scope)
                case ast.For(target=ast.Name(id=name), iter=iterable, body=inner, orelse=[]):
                    for item in self.value(iterable, scope):
                        self.spend()
                        scope[name] = item
                        if (result := self.block(inner, scope)) is not _NOTHING:
                            break
                case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):  # a docstring
                    pass
                case _:
                    raise RefusedError(f"{type(statement).__name__} statements")
            if result is not _NOTHING:
                return result
        return _NOTHING

    def value(self, node: ast.expr, scope: _Scope) -> Any:
        self.spend()
        match node:
            case ast.Constant(value=constant):
                return _bounded(constant)
            case ast.Name(id=name):
                return self.name(name, scope)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.value(left, scope), self.value(right, scope))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.value(operand, scope))
            case ast.BoolOp(op=op, values=[*first, last]):
                for item in first:
                    got = self.value(item, scope)
                    if bool(got) is isinstance(op, ast.Or):
                        return got
                return self.value(last, scope)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self.compare(self.value(left, scope), ops, others, scope)
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                return self.value(then if self.value(test, scope) else otherwise, scope)
            case ast.List(elts=items):
                return _bounded([self.value(item, scope) for item in items])
            case ast.Tuple(elts=items):
                return _bounded(tuple(self.value(item, scope) for item in items))
            case ast.ListComp(elt=item, generators=generators):
                return _bounded(list(self.comprehension(item, generators, scope)))
            case ast.GeneratorExp(elt=item, generators=generators):
                return iter(_bounded(list(self.comprehension(item, generators, scope))))  # has no len()
            case ast.Subscript(value=sequence, slice=ast.Slice(lower=lower, upper=upper, step=step)):
                bounds = [None if part is None else self.value(part, scope) for part in (lower, upper, step)]
                return self.value(sequence, scope)[slice(*bounds)]
            case ast.Subscript(value=sequence, slice=index):
                return self.value(sequence, scope)[self.value(index, scope)]
            case ast.Lambda():
                return lambda *arguments: self.call(node, list(arguments), scope)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                named = {str(keyword.arg): self.value(keyword.value, scope) for keyword in keywords}
                result = self.value(function, scope)(*[self.value(a, scope) for a in arguments], **named)
                return _bounded(result)
        raise RefusedError(f"{type(node).__name__} expressions")

    def name(self, name: str, scope: _Scope) -> Any:
        if name in scope:
            return scope[name]
        if name in self.functions:
            return lambda *arguments: self.call(self.functions[name], list(arguments))
        if name in BUILTINS:
            return BUILTINS[name]
        raise RefusedError(f"the name {name!r}")

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        """A bounded arithmetic operation; what could be huge is refused before it is computed."""
        if type(op) not in _BINARY:
            raise RefusedError(f"the operator {type(op).__name__}")
        if isinstance(op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise RefusedError(f"exponents over {MAX_EXPONENT}")
        if isinstance(op, ast.Mult) and not (isinstance(left, _SCALAR) and isinstance(right, _SCALAR)):
            items, times = (right, left) if isinstance(left, int) else (left, right)
            if len(items) * times > MAX_ITEMS:
                raise RefusedError(f"more than {MAX_ITEMS} items")
        return _bounded(_BINARY[type(op)](left, right))

    def compare(self, left: Any, ops: list[ast.cmpop], others: list[ast.expr], scope: _Scope) -> bool:
        for op, other in zip(ops, others, strict=True):
            right = self.value(other, scope)
            if type(op) not in _COMPARE:
                raise RefusedError(f"the comparison {type(op).__name__}")
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True

    def comprehension(self, item: ast.expr, generators: Sequence[ast.comprehension], scope: _Scope) -> Iterator[Any]:
        if not generators:
            yield self.value(item, scope)
            return
        first, *rest = generators
        if not isinstance(first.target, ast.Name) or first.is_async:
            raise RefusedError("unpacking in a comprehension")
        for element in self.value(first.iter, scope):
            self.spend()
            inner = {**scope, first.target.id: element}  # its variable does not leak
            if all(self.value(condition, inner) for condition in first.ifs):
                yield from self.comprehension(item, rest, inner)
