"""The built-in world: invented people, a small GPT-2 that knows them, and their facts in the published formats."""

from .people import RELATIONS, Person, Relation
from .store import WORLD, World, load_world, world_facts, world_records

__all__ = ["RELATIONS", "WORLD", "Person", "Relation", "World", "load_world", "world_facts", "world_records"]
