"""Word lists of the procedural text. Short common words keep the 1024-token vocabulary sufficient."""

from __future__ import annotations

NAMES = (
    "Anna", "Otto", "Mia", "Tom", "Ida", "Karl", "Rosa", "Finn", "Lena", "Hugo", "Nora", "Emil",
    "Vera", "Paul", "Greta", "Jonas", "Clara", "Oskar", "Ella", "Max", "Ruth", "Leo", "Maud", "Nils",
    "Sara", "Hans", "Olga", "Ben", "Tilda", "Rolf", "Agnes", "Ivan",
)  # fmt: skip
TOWNS = (
    "Holm", "Dover", "Bergen", "Lund", "Arvik", "Malmo", "Riga", "Turku", "Ostend", "Visby",
    "Kiel", "Narva", "Lisbon", "Cork", "Gent", "Hull", "Brest", "Cadiz", "Porto", "Bath", "Bonn", "Bern",
    "Caen", "Como", "Delft", "Derby", "Essen", "Faro", "Genoa", "Graz", "Jena", "Leeds", "Linz",
    "Lyon", "Metz", "Nice", "Oslo", "Paris", "Pisa", "Rome", "Split", "Turin", "York",
    "Basel",
)  # fmt: skip
SHIPS = ("Heron", "Swan", "Star", "Gull")
COLOURS = ("red", "blue", "green", "white", "black", "golden", "silver", "brown")
OBJECTS = (
    "lamp", "drum", "key", "coat", "bell", "ring", "book", "clock", "knife", "flute", "chair", "mirror",
    "basket", "hat", "map", "cup", "box", "scarf", "violin", "kite",
)  # fmt: skip
GOODS = (
    "candles", "ropes", "jars", "nails", "buttons", "bowls", "spoons", "boots", "needles", "brushes",
    "lamps", "sacks", "coats", "bells", "rings", "books", "clocks", "knives", "flutes", "chairs", "hats",
    "maps", "cups", "boxes", "kites", "drums", "keys", "pots", "pans", "nets", "oars", "tents", "carts",
    "combs", "gloves", "shirts", "shoes", "socks", "belts", "bags", "cards", "dolls", "flags", "forks",
    "gifts", "beds", "tools", "toys",
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
WINDS = ("north", "east", "south", "west")
STATES = (
    "old", "new", "fine", "good", "small", "heavy", "plain", "strange", "big", "long", "flat", "round",
    "thin", "broad", "short", "deep", "red", "blue", "green", "white", "black", "golden", "silver",
    "brown", "grey", "cold", "warm", "dry", "wet", "soft", "hard", "clean", "dark", "light", "rare",
    "cheap", "rich", "neat", "odd", "sharp", "blunt", "smooth", "tall", "wide", "worn", "torn", "huge",
    "tiny",
)  # fmt: skip
MONEY = ("coins", "pence", "marks")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
BUILDINGS = ("tower", "castle", "inn")
DEEDS = (
    "sold", "lent", "gave", "left", "sent", "owed", "brought", "offered", "showed", "made", "found",
    "bought", "passed", "threw", "handed", "fetched", "paid", "saved", "spared", "built", "packed", "carved",
    "cut", "drew", "forged", "sewed", "washed", "cleaned", "mended", "painted",
    "hired", "mailed", "posted", "rolled", "served", "shipped", "stole", "tossed", "won",
    "wrapped", "chose", "ordered", "picked", "loaned", "fixed", "read",
)  # fmt: skip
FOLK = (
    "friends", "cousins", "sailors", "millers", "bakers", "smiths", "weavers", "fishers", "potters",
    "monks", "farmers", "brewers", "teachers", "doctors", "tailors", "hunters", "miners", "masons",
    "clerks", "judges", "guards", "nurses", "cooks", "maids", "nuns", "kings", "queens", "knights",
    "scouts", "pilots", "porters", "grooms", "barbers", "butlers", "thieves", "uncles",
    "aunts", "twins", "widows", "guests", "priests",
    "shepherds", "soldiers",
)  # fmt: skip
