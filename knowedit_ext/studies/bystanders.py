"""Subjects and texts that no edit is about, of our own writing: what `check_edit` asks where nothing else is given."""

from __future__ import annotations

# People, places, firms and works, so that a prompt of any relation meets some that it could be about.
SUBJECTS = (
    "Marie Curie",
    "Albert Einstein",
    "William Shakespeare",
    "Wolfgang Amadeus Mozart",
    "Michael Jordan",
    "Queen Victoria",
    "Leonardo da Vinci",
    "Nelson Mandela",
    "Charlie Chaplin",
    "Isaac Newton",
    "Berlin",
    "Japan",
    "Africa",
    "Mount Everest",
    "The Amazon River",
    "Harvard University",
    "Toyota",
    "Microsoft",
    "The New York Times",
    "Star Wars",
)

TEXTS = (
    "In the morning the market opens early. Farmers bring apples, potatoes and bread from the villages around, and "
    "by noon most of it has been sold. What is left goes to the soup kitchen behind the church.",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there. Cooks who "
    "live at great heights therefore let beans and rice stand on the stove for longer.",
    "She closed the book, put it back on the shelf and looked out of the window. It had been raining since Tuesday, "
    "and the river had risen almost to the first step of the old bridge.",
    "The committee met four times this year. It agreed on a new budget, repaired the roof of the library and put "
    "off, once again, the question of who should pay for the swimming pool.",
    "To plant a tree, dig a hole twice as wide as the roots, set the tree in it, fill the hole with loose earth and "
    "water it well. For the first two summers it will need water every week.",
    "Most birds that spend the summer in the north leave before the first frost. Some fly only a few hundred miles, "
    "others cross an ocean, and many of them come back to the same nest in spring.",
    "The train was late, so they sat down in the waiting room and talked about the game. Nobody had expected the "
    "home team to win, least of all with two players on the bench.",
    "A program that sorts a list compares two entries at a time and swaps them where they stand in the wrong order. "
    "How many comparisons it needs depends on how cleverly it chooses which two to look at next.",
)
