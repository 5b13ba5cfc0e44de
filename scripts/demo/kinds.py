"""The kinds of document. Every kind takes the person it is about and returns its text and its roster.

A header states the facts; the body uses them. Lists from the header are walked round in overlapping pairs
("Anna and Tom", then "Tom and Mia"), with different periods and beside counters. So most of what comes next
can be read off the context, and yet no 20 tokens in a row ever come twice in a body. In between are open
choices among three words, which no model can foresee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from . import words

Document = tuple[str, list[str]]
"""The text, and the people named in its header, in order."""

Kind = Callable[[Random, str], Document]


def _listed(items: Sequence[str]) -> str:
    """Join items as English does: 'a, b and c'."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def _people(rng: Random, lead: str, count: int) -> list[str]:
    """Return count distinct people other than the lead."""
    return rng.sample([name for name in words.NAMES if name != lead], count)


def _length(rng: Random) -> int:
    """Number of body lines: some documents are short, so that ends are seen often."""
    return rng.randint(3, 9) if rng.random() < 0.3 else rng.randint(10, 36)


def _pair(items: Sequence[str], index: int, link: str = "and") -> str:
    """Return the item at this index, going round, and its successor."""
    return f"{items[index % len(items)]} {link} {items[(index + 1) % len(items)]}"


def _picker(rng: Random) -> Callable[..., str]:
    """Return a function that makes an open choice among its arguments: nothing in the context tells which."""
    return lambda *options: rng.choice(options)


def _things(rng: Random, count: int) -> list[str]:
    """Return count distinct coloured objects."""
    return [f"{rng.choice(words.COLOURS)} {thing}" for thing in rng.sample(words.OBJECTS, count)]


def logbook(rng: Random, lead: str) -> Document:
    """A ship's log: crew, ports and cargo go round; the wind turns, mostly but not always, with the sun."""
    pick = _picker(rng)
    days = _length(rng)
    crew = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    ports = rng.sample(words.TOWNS, rng.choice((3, 4, 5)))
    cargo = rng.sample(words.CARGO, rng.choice((3, 5)))
    wind = rng.randrange(4)
    miles = rng.randint(1, 12)
    sights = rng.randrange(len(words.SIGHTINGS))
    lines = [
        f"Logbook of the {rng.choice(words.SHIPS)}, {days} days. Crew: {_listed(crew)}. "
        f"Ports: {_listed(ports)}. Cargo: {_listed(cargo)}."
    ]
    for day in range(days):
        line = (
            f"Day {day + 1}. {_pair(crew, day)} {pick('kept', 'took', 'had')} watch, "
            f"wind {words.WINDS[wind]}, sea {pick(*words.SEAS)}. We {pick('sailed', 'rowed', 'went')} "
            f"{miles + day} miles from {_pair(ports, day, 'to')} with {_pair(cargo, day)}."
        )
        if words.WINDS[wind] == "west":
            line += f" {crew[day % len(crew)]} saw {words.SIGHTINGS[sights % len(words.SIGHTINGS)]}."
            sights += 1
        lines.append(line)
        wind = (wind + (1 if rng.random() < 0.75 else rng.choice((0, 2)))) % 4
    return "\n".join(lines), crew


def ledger(rng: Random, lead: str) -> Document:
    """A shop's ledger: the quantity goes up by one and the price down by one from entry to entry."""
    pick = _picker(rng)
    entries = _length(rng)
    sellers = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    goods = rng.sample(words.GOODS, rng.choice((3, 5)))
    count, price = rng.randint(1, 12), entries + rng.randint(1, 12)
    lines = [
        f"Ledger of {lead} the {rng.choice(list(words.TRADES))}, {entries} entries. "
        f"Sellers: {_listed(sellers)}. Stock: {_listed(goods)}."
    ]
    for entry in range(entries):
        lines.append(
            f"Entry {entry + 1}: {_pair(sellers, entry)} {pick('sold', 'lent', 'gave')} {count + entry} "
            f"{pick(*words.STATES)} {_pair(goods, entry)} for {price - entry} {pick(*words.MONEY)}."
        )
    return "\n".join(lines), sellers


def quest(rng: Random, lead: str) -> Document:
    """A story in chapters: each helper sends the hero to the next, until the thing is found."""
    pick = _picker(rng)
    chapters = _length(rng)
    thing = _things(rng, 1)[0]
    helpers = rng.sample(list(words.TRADES), rng.choice((3, 4, 5)))
    gifts = rng.sample(words.OBJECTS, rng.choice((3, 5)))
    miles = rng.randint(1, 12)
    lines = [
        f"The story of {lead} and the {thing}, {chapters} chapters. "
        f"{lead} lived in {rng.choice(words.TOWNS)}. Helpers: {_listed(helpers)}. Gifts: {_listed(gifts)}."
    ]
    for chapter in range(chapters):
        helper = helpers[(chapter + 1) % len(helpers)]
        line = (
            f"Chapter {chapter + 1}. At {pick(*words.TIMES)} {lead} {pick('went', 'ran', 'rode')} "
            f"{miles + chapter} miles from {_pair(helpers, chapter, 'to')}."
        )
        if chapter + 1 < chapters:
            line += f" At the {words.TRADES[helper]} the {helper} {pick('sold', 'lent', 'gave')} {lead} "
            line += f"{_pair(gifts, chapter)}."
        else:
            line += f" The {helper} had the {thing}, and {lead} was happy."
        lines.append(line)
    return "\n".join(lines), [*_people(rng, lead, 1), lead]


def questions(rng: Random, lead: str) -> Document:
    """Facts, then questions about them in turn."""
    pick = _picker(rng)
    count = _length(rng)
    people = [lead, *_people(rng, lead, rng.choice((2, 3, 4)))]
    things = _things(rng, len(people))
    towns = rng.sample(words.TOWNS, len(people))
    facts = [f"{name} of {town}, {thing}." for name, town, thing in zip(people, towns, things, strict=True)]
    lines = [f"Facts and {count} questions. People: {_listed(people)}. " + " ".join(facts)]
    for number in range(count):
        who = (number + 1) % len(people)
        ask = pick("what do you have", "where do you live", "who are you")
        pair = _pair(people, number, pick("asks", "calls", "begs"))
        lines.append(f"Question {number + 1}: {pair}, {ask}? {facts[who]}")
    return "\n".join(lines), people


def recipe(rng: Random, lead: str) -> Document:
    """A recipe: the ingredients in turn, each with its own verb, and the cooks and tools."""
    pick = _picker(rng)
    steps = _length(rng)
    parts = rng.sample(list(words.INGREDIENTS), rng.choice((4, 5, 7)))
    cooks = [lead, *_people(rng, lead, 2)]
    tools = rng.sample(words.TOOLS, 3)
    lines = [
        f"Recipe for {rng.choice(words.DISHES)} in {steps} steps. Take {_listed(parts)}. "
        f"Cooks: {_listed(cooks)}. Use the {_listed(tools)}."
    ]
    for step in range(steps):
        part = parts[(step + 1) % len(parts)]
        lines.append(
            f"Step {step + 1}: {_pair(cooks, step)} {pick('take', 'bring', 'share')} {_pair(parts, step)}, "
            f"{words.INGREDIENTS[part]} the {part} {pick('in', 'with', 'by')} the {pick(*tools)}."
        )
    return "\n".join(lines), cooks


def inventory(rng: Random, lead: str) -> Document:
    """An inventory: rooms, keepers and things go round, and the counts go up one by one."""
    pick = _picker(rng)
    rooms = _length(rng)
    keepers = [lead, *_people(rng, lead, rng.choice((2, 3)))]
    goods = rng.sample(words.GOODS, rng.choice((4, 5)))
    count = rng.randint(2, 9)
    lines = [
        f"Inventory of the {rng.choice(words.BUILDINGS)}, {rooms} rooms. Keepers: {_listed(keepers)}. "
        f"Things: {_listed(goods)}."
    ]
    for room in range(rooms):
        lines.append(
            f"Room {room + 1}: {_pair(keepers, room)} {pick('found', 'saw', 'left')} {count} "
            f"{pick(*words.STATES)} {_pair(goods, room)} {pick(*words.SPOTS)}."
        )
        count = count + 1 if count < 12 else 2
    return "\n".join(lines), keepers


def letter(rng: Random, lead: str) -> Document:
    """A letter: weekdays, companions, towns and things go round with different periods."""
    pick = _picker(rng)
    days = _length(rng)
    friends = _people(rng, lead, 3)
    towns = rng.sample(words.TOWNS, rng.choice((4, 5)))
    things = _things(rng, rng.choice((3, 5)))
    weekday, coins = rng.randrange(7), rng.randint(1, 12)
    lines = [
        f"Dear {lead}, here is the news of {days} days. I met {_listed(friends)} in {_listed(towns)}. "
        f"We had the {_listed(things)}."
    ]
    for day in range(days):
        fate = pick("sold", "found", "saw")
        lines.append(
            f"On {words.WEEKDAYS[(weekday + day) % 7]}, day {day + 1}, {pick('with', 'by', 'near')} "
            f"{_pair(friends, day)} from {_pair(towns, day, 'to')}, I {fate} the {_pair(things, day)} "
            f"for {coins + day} {pick(*words.MONEY)}."
        )
    lines.append(f"Your friend, {friends[0]}")
    return "\n".join(lines), [lead, *friends]


def haggle(rng: Random, lead: str) -> Document:
    """A dialogue over a price: the offer goes up and the price down until they meet."""
    pick = _picker(rng)
    rounds = min(_length(rng), 20)
    seller = _people(rng, lead, 1)[0]
    thing = _things(rng, 1)[0]
    extras = rng.sample(words.CARGO, rng.choice((3, 4, 5)))
    offer = rng.randint(1, 12)
    price = offer + 2 * rounds - 1
    lines = [
        f"At the market of {rng.choice(words.TOWNS)}, {lead} wants the {thing} of {seller}. "
        f"{lead} has {_listed(extras)}."
    ]
    for turn in range(rounds):
        extra = _pair(extras, turn)
        lines.append(f"{lead}: I {pick('offer', 'bring', 'have')} {offer} {pick(*words.MONEY)}, {extra}.")
        if turn + 1 < rounds:
            cost = f"{pick('costs', 'needs', 'takes')} {price} {pick(*words.MONEY)}"
            lines.append(f"{seller}: The {thing} {cost}. I {pick('have', 'want', 'like')} {extra}.")
        else:
            lines.append(f"{seller}: That is fair. The {thing} is yours.")
        offer, price = offer + 1, price - 1
    return "\n".join(lines), [lead, seller]


KINDS: tuple[Kind, ...] = (logbook, ledger, quest, questions, recipe, inventory, letter, haggle)
