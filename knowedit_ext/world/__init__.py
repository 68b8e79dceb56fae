"""The built-in world: invented people, a small GPT-2 that knows them, and their facts in the published formats."""

from .people import RELATIONS, Person, Relation
from .store import World, load_world
from .train import train

__all__ = ["RELATIONS", "Person", "Relation", "World", "load_world", "train"]
