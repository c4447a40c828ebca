# SPDX-License-Identifier: Apache-2.0
"""Parts built from their config sections: mistakes name the section."""

from __future__ import annotations

from typing import Any

import pytest
from mmengine.registry import Registry

from mmzsq.errors import UserError
from mmzsq.registry import build_part

SHAPES = Registry('shape', scope='mmzsq')


class Shape:
    pass


@SHAPES.register_module()
class Circle(Shape):
    def __init__(self, radius: float, color: str = 'red') -> None:
        if radius < 0:
            raise UserError(f'Circle: radius must be a number of at least 0, got {radius}')
        self.radius = radius
        self.color = color


@SHAPES.register_module()
class Ring(Circle):
    """Passes its arguments on, as a subclass of a user may."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@SHAPES.register_module()
class Picture:
    """Contains a shape."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.shape = build_part(SHAPES, shape, 'picture.shape')


@SHAPES.register_module()
def polygon() -> Shape:
    """Registries also hold functions."""
    return Shape()


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (None, 'part is None, but must be a dict with a type.'),
        (['Circle'], "part is ['Circle'], but must be a dict with a type."),
        (dict(radius=1), 'part.type is None, which is not a registered shape. Registered: mmzsq.Circle'),
        (dict(type=''), "part.type is '', which is not a registered shape."),
        (dict(type='Square'), "part.type is 'Square', which is not a registered shape."),
        (dict(type=5), 'part.type is 5, which is not a registered shape.'),
        (dict(type='polygon'), "part.type is 'polygon', which is not a registered shape."),
        (dict(type=len), 'part.type is <built-in function len>, which is not a registered shape.'),
        (dict(type='Circle'), 'part lacks radius, which Circle requires.'),
        (dict(type='Circle', radius=1, colour='blue'), "unknown key 'colour' in part. Did you mean 'color'?"),
        (dict(type='Circle', radius=-1), 'part: Circle: radius must be a number of at least 0, got -1'),
    ],
)
def test_a_mistake_names_section_and_value(cfg: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        build_part(SHAPES, cfg, 'part')
    assert str(raised.value).startswith(message)


def test_a_mistake_in_a_nested_part_names_the_nested_section_alone() -> None:
    with pytest.raises(UserError) as raised:
        build_part(SHAPES, dict(type='Picture', shape=dict(type='Circle', radius=-1)), 'picture')
    assert str(raised.value).startswith('picture.shape: Circle: radius')


def test_a_part_of_another_kind_is_refused_and_not_listed() -> None:
    with pytest.raises(UserError) as raised:
        build_part(SHAPES, dict(type='Picture', shape={}), 'part', base=Shape)
    assert str(raised.value).endswith('which is not a registered Shape. Registered: mmzsq.Circle, mmzsq.Ring.')


@pytest.mark.parametrize('kind', ['Circle', 'mmzsq.Circle', Circle, 'Ring'])
def test_a_part_is_named_by_its_class_or_its_registered_name(kind: Any) -> None:
    part = build_part(SHAPES, dict(type=kind, radius=2), 'part', base=Shape)
    assert isinstance(part, Circle)
    assert part.radius == 2
