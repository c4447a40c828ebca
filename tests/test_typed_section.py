# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from mmengine.config import ConfigDict
from pydantic import Field

from mmzsq.errors import UserError
from mmzsq.typed_section import FromList, TypedSection, describe


class Inner(TypedSection):
    size: Annotated[int, Field(ge=1)]
    name: Literal['big', 'small'] = 'big'


class Outer(TypedSection):
    inner: Inner | list[Inner] | None
    pair: Annotated[tuple[float, float], FromList] = (0.0, 1.0)
    table: dict[str, Annotated[int, Field(ge=2, le=8)] | None] = {}


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (dict(inner=dict(size=0)), 's.inner.size is 0, but must be an integer of at least 1.'),
        (dict(inner=[dict(size=1), dict(size='x')]), "s.inner[1].size is 'x', but must be an integer of at least 1."),
        (
            dict(inner=dict(size=1, name='bog')),
            "s.inner.name is 'bog', but must be 'big' or 'small'. Did you mean 'big'?",
        ),
        (dict(inner=dict(sise=1)), "unknown key 'sise' in s.inner. Did you mean 'size'? Known keys: name, size."),
        (dict(inner=dict()), 's.inner lacks size.'),
        (dict(), 's lacks inner.'),
        (dict(inner=3), 's.inner is 3, but must be a dict (size, name), a list or None.'),
        (dict(inner=None, pair=[1]), 's.pair is [1], but must be a list or tuple.'),
        (dict(inner=None, table={'a.*': 9}), "s.table['a.*'] is 9, but must be an integer from 2 to 8 or None."),
        ([1], 's is [1], but must be a dict (inner, pair, table).'),
    ],
)
def test_one_message_names_key_value_and_what_is_allowed(section: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Outer.parse(section, 's')
    assert str(caught.value) == message


def test_a_misspelled_key_is_named_before_a_wrong_value() -> None:
    with pytest.raises(UserError, match="unknown key 'tabel'"):
        Outer.parse(dict(inner=dict(size=0), tabel={}), 's')


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(UserError) as caught:
        Outer.parse(dict(inner=None, pair='x' * 500), 's')
    assert len(str(caught.value)) < 200


def test_configs_of_mmengine_and_lists_for_tuples_are_read() -> None:
    section = Outer.parse(ConfigDict(inner=dict(size=2), pair=[1, 2]), 's')
    assert section.inner == Inner(size=2)
    assert section.pair == (1, 2)
    assert Outer.parse(section, 's') is section


@pytest.mark.parametrize(
    ('annotation', 'text'),
    [
        (bool, 'True or False'),
        (int | None, 'an integer or None'),
        (Annotated[float, Field(gt=0, le=1)], 'a number above 0 and of at most 1'),
        (Annotated[float, Field(ge=0, lt=1)] | Literal['mean'], "a number of at least 0 and below 1 or 'mean'"),
    ],
)
def test_descriptions_state_types_and_ranges(annotation: Any, text: str) -> None:
    assert describe(annotation) == text
