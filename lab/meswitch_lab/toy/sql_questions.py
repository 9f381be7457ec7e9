"""Questions that an SQL query answers, over a few made-up tables: prompts only, no query and no exact check.

They serve where text-to-SQL prompts are wanted (fidelity of the sql expert, its calibration, the router).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

PREFIX = "Write a SQL query: "


@dataclass(frozen=True, slots=True)
class _Table:
    """A made-up table: what a row is called, its columns, and phrases that only fit this world.

    `texts` maps a column to some of its values, `numbers` a column to its range. In `phrases`, `{column}` stands
    for a value of that column and `{item}` / `{items}` for a row / rows.
    """

    item: str
    items: str
    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[int, int]]
    phrases: tuple[str, ...]


CITIES = ("Oslo", "Porto", "Lima", "Boston", "Cairo", "Osaka", "Bergen", "Quito", "Dallas", "Leeds", "Turin", "Perth")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

TABLES = (
    _Table(
        "flight",
        "flights",
        {"origin": CITIES, "destination": CITIES[::-1], "airline": ("Norvia", "Blue Kite", "Aeropolar"), "day": DAYS},
        {"price": (60, 900), "duration": (40, 800), "number of stops": (0, 3), "departure hour": (5, 23)},
        (
            "what flights go from {origin} to {destination} on {day}",
            "show me the cheapest {item} from {origin} to {destination}",
            "i want to fly from {origin} to {destination} before {departure hour} o'clock",
            "which airlines fly nonstop from {origin} to {destination}",
            "list the {items} of {airline} that leave {origin} on {day} morning",
            "please give me round trip fares between {origin} and {destination} under {price} dollars",
        ),
    ),
    _Table(
        "student",
        "students",
        {"major": ("biology", "law", "history", "physics"), "home town": CITIES, "advisor": ("Dr Moss", "Dr Adeyemi")},
        {"grade": (50, 100), "year": (1, 5), "number of credits": (10, 180), "age": (17, 40)},
        (
            "Which students of {advisor} have not passed a course yet?",
            "How many students take more than {year} courses in the spring term?",
            "Who teaches the course with the most {major} students?",
            "Is there a {major} course worth {year} credits this semester?",
        ),
    ),
    _Table(
        "film",
        "films",
        {
            "director": ("Ana Ruiz", "Kofi Mensah", "Li Wen", "Sofia Berg"),
            "genre": ("drama", "comedy", "western", "thriller"),
            "actor": ("Jon Hale", "Mira Das", "Paula Croft"),
            "title": ("Glass Harbour", "The Ninth Door", "Paper Moon Road"),
        },
        {"year": (1950, 2024), "budget": (100_000, 90_000_000), "rating": (1, 10), "length": (70, 210)},
        (
            'Who directed the film " {title} "?',
            "Find all films in which {actor} acted after {year}",
            "Which actors have worked with {director} more than once?",
            'Who played the lead role in " {title} "?',
            "How many {genre} films did {director} make before {year}?",
        ),
    ),
    _Table(
        "shop",
        "shops",
        {"city": CITIES, "owner": ("Hill & Sons", "Marta Lopes", "K. Tanaka"), "kind": ("bakery", "florist", "cafe")},
        {"number of employees": (1, 60), "revenue": (10_000, 900_000), "year opened": (1920, 2023)},
        (
            "where can i find a {kind} in {city}",
            "give me a good {kind} on the main street in {city}",
            "How many {kind} shops are there in {city}?",
            "Which products sold in {city} were never returned?",
        ),
    ),
    _Table(
        "river",
        "rivers",
        {"country": ("Peru", "Norway", "Kenya", "Japan", "Chad"), "source lake": ("Mjosa", "Tana", "Titicaca")},
        {"length": (40, 6000), "depth": (1, 90), "number of bridges": (0, 120)},
        (
            "what is the longest river in {country}",
            "which countries border {country}",
            "how many people live in the capital of {country}",
            "what rivers run through the largest state of {country}",
            "what is the highest point in the countries bordering {country}",
        ),
    ),
    _Table(
        "match",
        "matches",
        {
            "home team": ("Red Foxes", "Harbour City", "Northgate", "Valley Rovers"),
            "opponent": ("Iron Bridge", "Lakeside", "Old Mill"),
            "venue": ("Tower Park", "Kings Field", "Dock Road"),
            "result": ("win", "draw", "loss"),
        },
        {"attendance": (200, 60_000), "season": (1990, 2024), "goals": (0, 9), "round": (1, 30)},
        (
            "What was the score when {home team} played {opponent}?",
            "What venue had an attendance larger than {attendance} in round {round}?",
            "On what date did {home team} play at {venue}?",
            "Which opponent has a result of {result} and more than {goals} goals?",
        ),
    ),
    _Table(
        "employee",
        "employees",
        {"department": ("sales", "research", "support"), "office": CITIES, "manager": ("R. Novak", "T. Ito")},
        {"salary": (20_000, 200_000), "age": (18, 66), "years of service": (0, 40)},
        (
            "Which department pays its {items} the most?",
            "Who earns more than {manager}?",
            "Which {items} work in {office} but report to {manager}?",
        ),
    ),
)

_GENERAL = (
    "How many {items} have {text} {value}?",
    "What is the {number} of the {item} with {text} {value}?",
    "What is the {number} when the {text} is {value}?",
    "Which {item} has the {most} {number}?",
    "What is the {text} of the {item} with the {most} {number}?",
    "What is the {average} {number} of {items} whose {text} is {value}?",
    "{show} all {items} with {number} {over} {amount}",
    "{show} the {text} and {number} of every {item}, sorted by {number}",
    "{show} the {items} where {text} is {value} and {number} is {over} {amount}",
    "What is the total number of {items} for each {text}?",
    "Which {text} has the most {items}?",
    "Name the {text} for {number} being {amount}",
    "How many different values of {text} are there among {items} with {number} {over} {amount}?",
    "What {text} has a {number} of {amount}?",
    "Are there any {items} with {text} {value} and {number} {over} {amount}?",
)
_SYNONYMS = {
    "show": ("Show", "List", "Find", "Give me", "Return"),
    "most": ("highest", "lowest", "largest", "smallest"),
    "average": ("average", "total", "maximum", "minimum"),
    "over": ("over", "under", "more than", "less than", "at least", "equal to"),
}


def sql_question(random: Random) -> str:
    """One question; half of them start with `PREFIX` and a quarter are written in lower case."""
    table = random.choice(TABLES)
    template = random.choice(table.phrases) if random.random() < 0.3 else random.choice(_GENERAL)
    text, number = random.choice(list(table.texts)), random.choice(list(table.numbers))
    words = {name: random.choice(choices) for name, choices in _SYNONYMS.items()}
    words |= {column: random.choice(values) for column, values in table.texts.items()}
    amounts = {column: str(random.randint(*span)) for column, span in table.numbers.items()}
    words |= amounts
    words |= {"item": table.item, "items": table.items, "text": text, "value": words[text]}
    words |= {"number": number, "amount": amounts[number]}
    question = template.format_map(words)
    if random.random() < 0.25:
        question = question.lower()
    return PREFIX + question if random.random() < 0.5 else question
