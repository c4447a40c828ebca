# SPDX-License-Identifier: Apache-2.0
"""Typed sections of a config: parsing with one clear message, and a description of every key.

A section is a pydantic model in strict mode. :meth:`TypedSection.parse` turns the first problem into a
:class:`~mmzsq.errors.UserError` that names the key, the value and what is allowed. :func:`describe` states what is
allowed in words. Messages and the reference page of all keys share these words.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticUndefined
from typing_extensions import Self

from mmzsq.errors import UserError, check_keys

SHOWN_LENGTH = 120
"""Longest value that a message shows, in characters."""


class Meaning:
    """States in words what a custom type allows, where the annotation itself does not.

    Args:
        text: Completes the sentence "must be ...".
    """

    def __init__(self, text: str) -> None:
        self.text = text


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(_to_tuple)
"""Lets a tuple be written as a list, as in JSON and on the command line."""


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Settings = Annotated[dict[str, Any], Meaning('a dict of settings')]
Type = Annotated[Any, Meaning('the name of a registered class, or the class')]
ImageSize = Annotated[
    Positive | Annotated[tuple[Positive, Positive], FromList],
    Meaning('one side of a square in pixels, (height, width) in pixels'),
]
Betas = Annotated[tuple[Decay, Decay], FromList, Meaning('two numbers of at least 0 and below 1')]


class TypedSection(BaseModel):
    """Base class of the sections. Keys are the fields; a docstring below a field says what it means."""

    model_config = ConfigDict(
        strict=True,
        extra='forbid',
        frozen=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @classmethod
    def parse(cls, section: Any, where: str) -> Self:
        """Read a section.

        Args:
            section: What the config holds, usually a dict.
            where: Name of the section in messages, for example ``'zsq.train'``.

        Raises:
            UserError: If a key is missing or unknown, or a value is not allowed.
        """
        if isinstance(section, cls):
            return section
        if not isinstance(section, Mapping):
            raise UserError(f'{where} is {_shown(section)}, but must be {describe(cls)}.')
        try:
            return cls.model_validate(_plain(section))
        except ValidationError as error:
            raise UserError(_message(cls, _plain(section), where, error)) from None


def failure(text: str, **values: Any) -> PydanticCustomError:
    """Make the error that a validator of a section raises.

    Args:
        text: The whole message; ``{where}`` is the name of the section.
        values: Further values to fill in.
    """
    return PydanticCustomError('section', text, values)


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """State in words what an annotation allows, to complete the sentence "must be ...".

    Args:
        annotation: A type, possibly ``Annotated``, a union or a literal.
        metadata: Constraints that belong to the annotation.

    Example:
        >>> describe(Annotated[int, Field(ge=2, le=8)])
        'an integer from 2 to 8'
        >>> describe(Literal['sum', 'mean'] | None)
        "'sum', 'mean' or None"
    """
    constraints: list[Any] = []
    for item in metadata:
        if isinstance(item, Meaning):
            return item.text
        constraints += getattr(item, 'metadata', None) or [item]
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return describe(inner, [*extra, *metadata])
    if origin in (Union, types.UnionType):
        return _join(_alternatives(annotation))
    if origin is Literal:
        return _join([repr(value) for value in get_args(annotation)])
    if origin in (list, tuple, dict):
        return {list: 'a list', tuple: 'a list or tuple', dict: 'a dict'}[origin]
    if annotation is type(None):
        return 'None'
    if annotation is bool:
        return 'True or False'
    if annotation is str:
        return 'a string'
    if annotation in (int, float):
        return f'{"an integer" if annotation is int else "a number"}{_interval(constraints)}'
    if isinstance(annotation, type) and issubclass(annotation, TypedSection):
        return f'a dict ({", ".join(annotation.model_fields)})'
    return 'a value of another kind'


def section_classes(annotation: Any) -> list[type[TypedSection]]:
    """Return the sections among the alternatives of an annotation, those within lists included."""
    found: list[type[TypedSection]] = []
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, TypedSection):
            found.append(member)
        elif get_origin(member) is list:
            found += section_classes(get_args(member)[0])
    return list(dict.fromkeys(found))


def nearest(word: Any, known: Sequence[str], cutoff: float = 0.4) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=cutoff)
    return f' Did you mean {found[0]!r}?' if found else ''


def _alternatives(annotation: Any) -> list[str]:
    texts: list[str] = []
    for part in get_args(annotation):
        if get_origin(part) is Literal:
            texts += [repr(value) for value in get_args(part)]
        else:
            texts += ['True', 'False'] if part is bool else [describe(part)]
    return list(dict.fromkeys(texts))


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f'{", ".join(words[:-1])} or {words[-1]}'


def _interval(constraints: Sequence[Any]) -> str:
    found = {type(item): item for item in constraints}
    if Ge in found and Le in found:
        return f' from {found[Ge].ge} to {found[Le].le}'
    texts = [
        *([f'of at least {found[Ge].ge}'] if Ge in found else []),
        *([f'above {found[Gt].gt}'] if Gt in found else []),
        *([f'of at most {found[Le].le}'] if Le in found else []),
        *([f'below {found[Lt].lt}'] if Lt in found else []),
    ]
    return f' {" and ".join(texts)}' if texts else ''


def _plain(value: Any) -> Any:
    """Turn MMEngine's config types, and tuples, into the dicts and lists that strict validation takes."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, '_fields'):
        return [_plain(item) for item in value]
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f'{text[: SHOWN_LENGTH - 3]}...'


def _message(cls: type[TypedSection], section: Any, where: str, error: ValidationError) -> str:
    """Describe the most specific problem; a misspelled key comes before all others."""
    problems = [(_resolve(cls, section, where, detail['loc']), detail) for detail in error.errors()]
    problems.sort(key=lambda problem: (problem[1]['type'] != 'extra_forbidden', -problem[0].depth))
    place, detail = problems[0]
    if detail['type'] == 'extra_forbidden':
        try:
            check_keys({place.key: None}, list(place.owner.model_fields), place.parent)
        except UserError as unknown:
            return str(unknown)
    if detail['type'] == 'invalid_key' or detail['loc'][-1:] == ('[key]',):
        found = place.key == detail['input']
        return f'{place.parent if found else place.path} has the key {detail["input"]!r}, but keys must be strings.'
    if detail['type'] == 'missing' and detail['loc'][-1] == place.key:
        return f'{place.parent} lacks {place.key}.'
    if detail['type'] == 'section':
        return detail['msg'].replace('{where}', place.path)
    words = [str(word) for word in _literals(place.annotation)]
    hint = nearest(place.value, words) if isinstance(place.value, str) and words else ''
    return f'{place.path} is {_shown(place.value)}, but must be {describe(place.annotation, place.metadata)}.{hint}'


class _Place:
    """A value within a section: where it is, what its annotation is, and which section owns it."""

    def __init__(self, cls: type[TypedSection], value: Any, path: str) -> None:
        self.owner = cls
        self.annotation: Any = cls
        self.metadata: Sequence[Any] = ()
        self.value = value
        self.path = self.parent = path
        self.key: Any = ''
        self.depth = 0


def _resolve(cls: type[TypedSection], section: Any, where: str, location: Sequence[Any]) -> _Place:
    """Follow an error's location through the section; parts that only name a member of a union are passed over."""
    place = _Place(cls, section, where)
    metadata: Sequence[Any]
    for part in location:
        section_class = _section_in(place.annotation, place.value)
        if section_class is not None and isinstance(part, str) and part in section_class.model_fields:
            field = section_class.model_fields[part]
            annotation, metadata = field.annotation, field.metadata
        elif isinstance(place.value, Mapping) and part in place.value:
            annotation, metadata = _item_annotation(place.annotation, dict), ()
        elif isinstance(place.value, (list, tuple)) and isinstance(part, int) and part < len(place.value):
            annotation, metadata = _item_annotation(place.annotation, (list, tuple)), ()
        else:
            continue
        named = section_class is not None and isinstance(part, str)
        place.parent, place.key = place.path, part
        if section_class is not None:
            place.owner = section_class
        place.path = f'{place.path}.{part}' if named else f'{place.path}[{part!r}]'
        place.value = (
            place.value.get(part, PydanticUndefined) if isinstance(place.value, Mapping) else place.value[part]
        )
        place.annotation, place.metadata = annotation, metadata
        place.depth += 1
    return place


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _section_in(annotation: Any, value: Any) -> type[TypedSection] | None:
    if not isinstance(value, Mapping):
        return None
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, TypedSection):
            return member
    return None


def _item_annotation(annotation: Any, origins: Any) -> Any:
    wanted = origins if isinstance(origins, tuple) else (origins,)
    for member in _members(annotation):
        if get_origin(member) in wanted:
            arguments = [argument for argument in get_args(member) if argument is not Ellipsis]
            return arguments[-1] if arguments else Any
    return Any


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for member in _members(annotation)
        if get_origin(member) is Literal
        for value in get_args(member)
        if isinstance(value, str)
    ]
