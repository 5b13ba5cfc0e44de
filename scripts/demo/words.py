"""Word lists of the procedural text. Short common words keep the 1024-token vocabulary sufficient."""

from __future__ import annotations

NAMES = (
    "Anna", "Otto", "Mia", "Tom", "Ida", "Karl", "Rosa", "Finn", "Lena", "Hugo", "Nora", "Emil",
    "Vera", "Paul", "Greta", "Jonas", "Clara", "Oskar", "Ella", "Max", "Ruth", "Leo", "Maud", "Nils",
    "Sara", "Hans", "Olga", "Ben", "Tilda", "Rolf", "Agnes", "Ivan",
)  # fmt: skip
TOWNS = (
    "Holm", "Dover", "Bergen", "Lund", "Arvik", "Stade", "Malmo", "Riga", "Turku", "Ostend", "Visby", "Kiel",
    "Narva", "Lisbon", "Cork", "Gent", "Hull", "Brest", "Cadiz", "Porto",
)  # fmt: skip
SHIPS = ("Heron", "Swan", "Star", "Gull")
COLOURS = ("red", "blue", "green", "white", "black", "golden", "silver", "brown")
OBJECTS = (
    "lamp", "drum", "key", "coat", "bell", "ring", "book", "clock", "knife", "flute", "chair", "mirror",
    "basket", "hat", "map", "cup", "box", "scarf", "violin", "kite",
)  # fmt: skip
CARGO = (
    "salt", "wool", "tar", "wine", "iron", "timber", "grain", "linen", "copper", "fish", "cheese", "glass",
    "paper", "rope",
)  # fmt: skip
GOODS = (
    "candles", "ropes", "jars", "nails", "buttons", "bowls", "spoons", "boots", "needles", "brushes", "lamps",
    "sacks",
)  # fmt: skip
# Each trade has its own work place: a fact that only the weights can know.
TRADES = {
    "miller": "mill", "baker": "oven", "smith": "forge", "weaver": "loom", "fisher": "harbour",
    "potter": "kiln", "monk": "chapel", "farmer": "barn", "brewer": "cellar", "teacher": "school",
    "doctor": "hospital", "gardener": "garden",
}  # fmt: skip
# Each ingredient has the verb that prepares it.
INGREDIENTS = {
    "onions": "chop", "barley": "wash", "carrots": "peel", "butter": "melt", "milk": "warm", "eggs": "beat",
    "flour": "sift", "herbs": "cut", "beans": "soak", "apples": "slice", "honey": "pour", "bread": "toast",
    "cabbage": "boil", "nuts": "crush",
}  # fmt: skip
DISHES = ("soup", "pie", "cake")
TOOLS = ("clay bowl", "iron pan", "big pot", "copper kettle", "wooden dish")
WINDS = ("north", "east", "south", "west")
SEAS = ("rough", "calm", "high")
STATES = ("old", "new", "fine")
MONEY = ("coins", "pence", "marks")
SIGHTINGS = ("a sail", "a light", "a whale")
TIMES = ("dawn", "noon", "night")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
BUILDINGS = ("tower", "castle", "inn")
SPOTS = ("by the window", "near the door", "on the shelf")
