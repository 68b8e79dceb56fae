"""What the relations of CounterFact, zsRE and the built-in world are called (the labels of Wikidata's properties)."""

from __future__ import annotations

NAMES = {
    "P17": "country",
    "P19": "place of birth",
    "P20": "place of death",
    "P27": "citizenship",
    "P30": "continent",
    "P36": "capital",
    "P37": "official language",
    "P39": "position held",
    "P101": "field of work",
    "P103": "native language",
    "P106": "occupation",
    "P108": "employer",
    "P127": "owner",
    "P131": "located in",
    "P136": "genre",
    "P138": "named after",
    "P140": "religion",
    "P159": "headquarters",
    "P176": "manufacturer",
    "P178": "developer",
    "P190": "twin city",
    "P264": "record label",
    "P276": "location",
    "P279": "subclass of",
    "P364": "original language",
    "P407": "language of work",
    "P413": "playing position",
    "P449": "broadcaster",
    "P463": "member of",
    "P495": "country of origin",
    "P527": "has part",
    "P530": "diplomatic relation",
    "P641": "sport",
    "P740": "place founded",
    "P937": "work location",
    "P1001": "jurisdiction",
    "P1303": "instrument",
    "P1376": "capital of",
    "P1412": "languages spoken",
}


def relation_name(relation_id: str) -> str:
    """ "P103" -> "native language (P103)", "P103+P106" of both; an id without a name is its own."""
    ids = relation_id.split("+")
    return " + ".join(f"{NAMES[each]} ({each})" for each in ids) if all(each in NAMES for each in ids) else relation_id
