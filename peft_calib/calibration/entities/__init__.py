"""Entities of tagged words: found, each with the probability that it is right, and measured against the true ones."""

from .found import Entities, find_entities
from .report import EntitiesReport, TypeRow, entities_report
from .spans import TagSet, spans_of

__all__ = ["EntitiesReport", "Entities", "TagSet", "TypeRow", "entities_report", "find_entities", "spans_of"]
