"""The kinds of answer, by the name that `predictor.json` has of them: a new one is a file here and a line below."""

from .base import Kind
from .classes import Classes
from .entities import Entities, EntitiesAnswer
from .labels import Labels, LabelsAnswer
from .numbers import NumberAnswer, Numbers

__all__ = ["KINDS", "EntitiesAnswer", "Kind", "LabelsAnswer", "NumberAnswer"]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classes(), Labels(), Numbers(), Entities())}
