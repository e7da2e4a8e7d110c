"""Out into the world: an adapter on the Hub, with a card that says how calibrated it is and how that was measured."""

from .facts import Measurement, Subject
from .push import push_to_hub, write_card
from .spaces import push_metric, write_space

__all__ = ["Measurement", "Subject", "push_metric", "push_to_hub", "write_card", "write_space"]
