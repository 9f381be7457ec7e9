"""JSON -> dataclasses, strictly: an unknown field, a missing one or a wrong type is an error that names it."""

import dataclasses
import functools
import types
import typing
from pathlib import Path
from typing import Any

from meswitch.errors import MeswitchError


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """How the errors of one kind of file read.

    error: raised. fix: ends the message about a missing field. complete: fields with a default must be there too.
    """

    file: Path
    error: type[MeswitchError]
    fix: str
    complete: bool = False

    def decode(self, kind: Any, value: Any, where: str = "") -> Any:
        """`value` as `kind`, a type made of dataclasses, dict[str, X], tuple[X, ...], X | None and scalars.

        Raises:
            MeswitchError: `error`, with the file and the field.
        """
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            options = [option for option in arguments if option is not type(None)]
            return None if value is None else self.decode(options[0], value, where)
        if origin is dict:
            self._expect(isinstance(value, dict), where, "an object", value)
            return {key: self.decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        if origin is tuple:
            self._expect(isinstance(value, list), where, "a list", value)
            return tuple(self.decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if dataclasses.is_dataclass(kind):
            self._expect(isinstance(value, dict), where, "an object", value)
            return self._dataclass(kind, value, f"{where}." if where else "")
        accepted = (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        self._expect(fits, where, kind.__name__, value)
        return value

    def _dataclass(self, kind: Any, value: dict[str, Any], prefix: str) -> Any:
        hints = _hints(kind)
        for key in value:
            if key not in hints:
                raise self.error(f"{self.file}: {prefix}{key}: unknown field; it was written by another version")
        absent: dict[str, Any] = {}
        for item in dataclasses.fields(kind):
            if item.name in value:
                continue
            optional = type(None) in typing.get_args(hints[item.name])
            has_default = item.default is not dataclasses.MISSING
            if self.complete or not (optional or has_default):
                raise self.error(f"{self.file}: {prefix}{item.name}: missing field; {self.fix}")
            if not has_default:
                absent[item.name] = None
        return kind(**absent, **{key: self.decode(hints[key], item, f"{prefix}{key}") for key, item in value.items()})

    def _expect(self, fits: bool, where: str, wanted: str, value: Any) -> None:
        if not fits:
            raise self.error(f"{self.file}: {where or 'the file'}: expected {wanted}, found {value!r:.80}")


@functools.cache  # evaluating the annotations is most of the time that a large file takes
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
