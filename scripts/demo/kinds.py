"""The kinds of document. Every kind takes the person it is about and returns its text and its roster.

A header states the facts; the body uses them. Lists from the header are walked round in overlapping pairs
("Anna and Tom", then "Tom and Mia"), with different periods and beside counters. So more than half of what
comes next can be read off the context, and yet hardly ever do 20 tokens in a row come twice in a body. The
other tokens are open choices, as in most texts: a few usual words, and many that are likely only together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from . import words

Document = tuple[str, list[str]]
"""The text, and the people named in its header, in order."""

Kind = Callable[[Random, str], Document]

Usual = Sequence[str]
"""The words that are likelier than the others at an open place, and equally likely among themselves."""


def _listed(items: Sequence[str]) -> str:
    """Join items as English does: 'a, b and c'."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def _people(rng: Random, lead: str, count: int) -> list[str]:
    """Return count distinct people other than the lead."""
    return rng.sample([name for name in words.NAMES if name != lead], count)


def _length(rng: Random) -> int:
    """Number of body lines: some documents are short, so that ends are seen often."""
    return rng.randint(3, 9) if rng.random() < 0.3 else rng.randint(10, 36)


def _open(rng: Random, options: Sequence[str], usual: Usual) -> str:
    """Return one of the usual words one time in five, else any of the options."""
    return rng.choice(usual if rng.random() < 0.2 else options)


def _goods(rng: Random, usual: Usual) -> str:
    """Return something to have, and its state."""
    return f"{_open(rng, words.STATES, words.STATES[:3])} {_open(rng, words.GOODS, usual)}"


def _deed(rng: Random, usual: Usual) -> str:
    """Return something to do, and for whom."""
    folk = f"{_open(rng, words.STATES, words.STATES[3:6])} {_open(rng, words.FOLK, words.FOLK[:3])}"
    return f"{_open(rng, words.DEEDS, usual)} {folk}"


def _events(
    rng: Random,
    people: Sequence[str],
    index: int,
    count: int,
    deeds: Usual,
    goods: Usual,
    towns: Usual,
) -> str:
    """Tell two events: people in turn, a count, and open choices of which the given ones are usual."""
    first, second = people[index % len(people)], people[(index + 1) % len(people)]
    return (
        f"{first} {_deed(rng, deeds)} {_goods(rng, goods)} and {count} {_goods(rng, goods)} "
        f"in {_open(rng, words.STATES, words.STATES[6:9])} {_open(rng, words.TOWNS, towns)}, "
        f"{second} {_deed(rng, deeds)} {_goods(rng, goods)} in {_open(rng, words.TOWNS, towns)}."
    )


def _things(rng: Random, count: int) -> list[str]:
    """Return count distinct coloured objects."""
    return [f"{rng.choice(words.COLOURS)} {thing}" for thing in rng.sample(words.OBJECTS, count)]


def logbook(rng: Random, lead: str) -> Document:
    """A ship's log: the crew goes round; the wind turns, mostly but not always, with the sun."""
    days = _length(rng)
    crew = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    wind, bales = rng.randrange(4), rng.randint(2, 12)
    deeds, goods = ("brought", "left", "owed"), ("ropes", "oars", "nets")
    towns = ("Bergen", "Malmo", "Oslo")
    lines = [f"Logbook of the {rng.choice(words.SHIPS)}, {days} days. Crew: {_listed(crew)}."]
    for day in range(days):
        events = _events(rng, crew, day, bales + day, deeds, goods, towns)
        lines.append(f"Day {day + 1}, wind {words.WINDS[wind]}. {events}")
        wind = (wind + (1 if rng.random() < 0.75 else rng.choice((0, 2)))) % 4
    return "\n".join(lines), crew


def ledger(rng: Random, lead: str) -> Document:
    """A shop's ledger: the quantity goes up by one and the price down by one from entry to entry."""
    entries = _length(rng)
    sellers = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    count, price = rng.randint(2, 12), entries + rng.randint(1, 12)
    deeds, goods = ("sold", "lent", "paid"), ("nails", "bags", "tools")
    towns = ("Lund", "Kiel", "Basel")
    lines = [
        f"Ledger of {lead} the {rng.choice(list(words.TRADES))}, {entries} entries. "
        f"Sellers: {_listed(sellers)}."
    ]
    for entry in range(entries):
        events = _events(rng, sellers, entry, count + entry, deeds, goods, towns)
        lines.append(f"Entry {entry + 1}, {price - entry} {rng.choice(words.MONEY)}. {events}")
    return "\n".join(lines), sellers


def quest(rng: Random, lead: str) -> Document:
    """A story in chapters: the hero goes from helper to helper, until the thing is found."""
    chapters = _length(rng)
    thing = _things(rng, 1)[0]
    helpers = rng.sample(list(words.TRADES), rng.choice((3, 4, 5)))
    friends = [lead, *_people(rng, lead, rng.choice((2, 3)))]
    coins = rng.randint(2, 12)
    deeds, goods = ("gave", "found", "stole"), ("keys", "rings", "maps")
    towns = ("Holm", "Dover", "Arvik")
    lines = [
        f"The story of {lead} and the {thing}, {chapters} chapters. Helpers: {_listed(helpers)}. "
        f"Friends: {_listed(friends)}."
    ]
    for chapter in range(chapters - 1):
        helper = helpers[(chapter + 1) % len(helpers)]
        events = _events(rng, friends, chapter, coins + chapter, deeds, goods, towns)
        lines.append(f"Chapter {chapter + 1}, the {words.TRADES[helper]}. {events}")
    helper = helpers[chapters % len(helpers)]
    lines.append(f"Chapter {chapters}. The {helper} had the {thing}, and {lead} was happy.")
    return "\n".join(lines), friends


def questions(rng: Random, lead: str) -> Document:
    """Facts, then questions about them in turn."""
    count = _length(rng)
    people = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    things = _things(rng, len(people))
    cards = rng.randint(2, 12)
    deeds, goods = ("showed", "sent", "read"), ("books", "cards", "clocks")
    towns = ("Riga", "Bern", "Rome")
    facts = [f"{name} has the {thing}." for name, thing in zip(people, things, strict=True)]
    lines = [f"Facts and {count} questions. People: {_listed(people)}. " + " ".join(facts)]
    for number in range(count):
        who = (number + 1) % len(people)
        events = _events(rng, people, number, cards + number, deeds, goods, towns)
        lines.append(f"Question {number + 1}: the {things[who]}? {people[who]}. {events}")
    return "\n".join(lines), people


def recipe(rng: Random, lead: str) -> Document:
    """A recipe: the ingredients in turn, each with its own verb, and the cooks."""
    steps = _length(rng)
    parts = rng.sample(list(words.INGREDIENTS), rng.choice((4, 5, 7)))
    cooks = [lead, *_people(rng, lead, 2)]
    cups = rng.randint(2, 12)
    deeds, goods = ("served", "saved", "handed"), ("bowls", "spoons", "jars")
    towns = ("Cork", "Leeds", "Hull")
    lines = [
        f"Recipe for {rng.choice(words.DISHES)} in {steps} steps. Take {_listed(parts)}. "
        f"Cooks: {_listed(cooks)}."
    ]
    for step in range(steps):
        part = parts[(step + 1) % len(parts)]
        events = _events(rng, cooks, step, cups + step, deeds, goods, towns)
        lines.append(f"Step {step + 1}: {words.INGREDIENTS[part]} the {part}. {events}")
    return "\n".join(lines), cooks


def inventory(rng: Random, lead: str) -> Document:
    """An inventory: the keepers go round, and the counts go up one by one."""
    rooms = _length(rng)
    keepers = [lead, *_people(rng, lead, rng.choice((2, 3)))]
    count = rng.randint(2, 12)
    deeds, goods = ("built", "hired", "packed"), ("lamps", "beds", "chairs")
    towns = ("Brest", "Caen", "Lyon")
    lines = [f"Inventory of the {rng.choice(words.BUILDINGS)}, {rooms} rooms. Keepers: {_listed(keepers)}."]
    for room in range(rooms):
        events = _events(rng, keepers, room, count + room, deeds, goods, towns)
        lines.append(f"Room {room + 1}. {events}")
    return "\n".join(lines), keepers


def letter(rng: Random, lead: str) -> Document:
    """A letter: weekdays and companions go round with different periods."""
    days = _length(rng)
    friends = _people(rng, lead, 3)
    weekday, coins = rng.randrange(7), rng.randint(2, 12)
    deeds, goods = ("bought", "mailed", "sewed"), ("coats", "gloves", "hats")
    towns = ("Turku", "Visby", "Faro")
    lines = [f"Dear {lead}, here is the news of {days} days. I met {_listed(friends)}."]
    for day in range(days):
        events = _events(rng, friends, day, coins + day, deeds, goods, towns)
        lines.append(f"Day {day + 1}, {words.WEEKDAYS[(weekday + day) % 7]}. {events}")
    lines.append(f"Your friend, {friends[0]}")
    return "\n".join(lines), [lead, *friends]


def haggle(rng: Random, lead: str) -> Document:
    """A dialogue over a price: the offer goes up and the price down until they meet."""
    rounds = min(_length(rng), 20)
    friends = [lead, *_people(rng, lead, rng.choice((3, 4)))]
    seller = friends[1]
    thing = _things(rng, 1)[0]
    offer = rng.randint(1, 12)
    price = offer + 2 * rounds - 1
    deeds, goods = ("offered", "made", "fixed"), ("drums", "flutes", "bells")
    towns = ("Narva", "Jena", "Linz")
    lines = [f"At the market, {lead} wants the {thing} of {seller}. Friends: {_listed(friends)}."]
    for turn in range(rounds):
        money = rng.choice(words.MONEY)
        lines.append(f"{lead}: {offer} {money}.")
        if turn + 1 < rounds:
            events = _events(rng, friends, turn, price, deeds, goods, towns)
            lines.append(f"{seller}: {price} {money}. {events}")
        else:
            lines.append(f"{seller}: That is fair. The {thing} is yours.")
        offer, price = offer + 1, price - 1
    return "\n".join(lines), [lead, seller]


KINDS: tuple[Kind, ...] = (logbook, ledger, quest, questions, recipe, inventory, letter, haggle)
