"""Varied English-like prose, made from templates and word lists: haystack text without a licence to mind."""

from __future__ import annotations

import random
import re
from typing import NamedTuple


class Scene(NamedTuple):
    """Words that belong together: a paragraph draws from one scene."""

    place: str
    people: tuple[str, ...]
    things: tuple[str, ...]
    deeds: tuple[str, ...]


SCENES = (
    Scene(
        "the harbour",
        ("the pilot", "a fisherman", "the customs clerk", "a deckhand", "the lighthouse keeper", "a rope maker"),
        ("a coil of rope", "the tide table", "an upturned boat", "the foghorn", "a crate of herring", "the sea wall"),
        ("mended the nets", "counted the barrels", "waited for the ferry", "painted a hull", "read the barometer"),
    ),
    Scene(
        "the orchard",
        ("the grower", "her youngest son", "a beekeeper", "a hired picker", "an old neighbour", "the cider maker"),
        ("the long ladder", "a basket of plums", "the crooked pear tree", "a row of hives", "the press", "wet grass"),
        ("pruned the branches", "gathered windfalls", "tasted the first apples", "checked for frost", "tied the vines"),
    ),
    Scene(
        "the observatory",
        ("the astronomer", "a visiting student", "the night watchman", "the instrument maker", "her assistant"),
        ("the brass telescope", "a chart of faint stars", "the logbook", "a cracked lens", "the dome", "a cold stove"),
        ("measured the eclipse", "waited for the clouds to part", "copied the readings", "oiled the gears"),
    ),
    Scene(
        "the railway station",
        ("the station master", "a late passenger", "the signalman", "a schoolboy", "the ticket inspector"),
        ("the departures board", "a forgotten suitcase", "the iron bridge", "a tin of polish", "platform two"),
        ("announced the delay", "swept the waiting room", "looked for the timetable", "carried the luggage"),
    ),
    Scene(
        "the bakery",
        ("the baker", "an apprentice", "the miller's daughter", "a hungry customer", "the delivery driver"),
        ("a tray of rolls", "the brick oven", "a sack of rye", "the copper bowl", "the shop bell", "a burnt loaf"),
        ("kneaded the dough", "lit the fire before dawn", "wrapped the bread", "weighed the flour", "wiped the table"),
    ),
    Scene(
        "the town library",
        ("the librarian", "a retired teacher", "the archivist", "a reader", "a bookbinder", "the caretaker"),
        ("a shelf of atlases", "the card catalogue", "an unsigned letter", "the reading lamp", "a torn map"),
        ("sorted the returns", "repaired a spine", "argued about a date", "searched the basement", "shut the windows"),
    ),
    Scene(
        "the mountain hut",
        ("the guide", "a tired climber", "the hut warden", "a geologist", "the mule driver", "a painter"),
        ("a frayed map", "the stone chimney", "a pair of boots", "the weather radio", "the steep path", "a tin cup"),
        ("melted snow for tea", "studied the ridge", "dried the tents", "told an old story", "marked the trail"),
    ),
    Scene(
        "the workshop",
        ("the clockmaker", "a carpenter", "the glazier", "her cousin", "an inventor", "the foreman"),
        ("a box of springs", "the lathe", "an unfinished chair", "a pane of green glass", "the workbench", "some glue"),
        ("sharpened a chisel", "cleaned the machine", "sketched a new plan", "polished the hinges", "cut the boards"),
    ),
    Scene(
        "the market square",
        ("a cheese seller", "the mayor", "a street musician", "the florist", "a farmer", "the pharmacist"),
        ("a striped awning", "the fountain", "a cage of hens", "a bundle of leeks", "the notice board", "a scale"),
        ("bargained over onions", "set up the stalls", "played an old waltz", "counted the coins", "fed the pigeons"),
    ),
    Scene(
        "the river mill",
        ("the miller", "a ferryman", "the engineer", "an angler", "the grandmother", "a surveyor"),
        ("the great wheel", "a leaking sluice", "the mill pond", "a heap of chaff", "the footbridge", "a buoy"),
        ("cleared the weeds", "watched the water rise", "repaired the dam", "ground the barley", "tested the current"),
    ),
    Scene(
        "the botanical garden",
        ("the head gardener", "a botanist", "a volunteer", "a photographer", "a boy with a notebook"),
        ("the glasshouse", "a rare orchid", "a tray of seedlings", "the lily pond", "a watering can", "the herb bed"),
        ("labelled the ferns", "turned the compost", "sketched a leaf", "opened the vents", "collected the seeds"),
    ),
    Scene(
        "the theatre",
        ("the stage manager", "an understudy", "the costume maker", "the conductor", "a nervous actor", "the prompter"),
        ("a velvet curtain", "the trapdoor", "a paper crown", "the orchestra pit", "a box of wigs", "the back row"),
        ("rehearsed the last act", "missed a cue", "tuned the instruments", "hung the lanterns", "sold the tickets"),
    ),
)  # fmt: skip

TIMES = (
    "In the early morning", "Shortly before noon", "Late in the afternoon", "On the first day of spring", "That winter",
    "Some years earlier", "The following week", "Before the storm", "At the end of the month", "One quiet Sunday",
    "As soon as the rain stopped", "Towards evening", "After a long pause", "During the holidays", "Every Tuesday",
)  # fmt: skip
QUALITIES = (
    "patient", "careful", "impatient", "cheerful", "rather tired", "unusually quiet", "proud of the result", "puzzled",
    "grateful", "a little suspicious", "absent-minded", "stubborn", "curious", "relieved", "in no hurry at all",
)  # fmt: skip
LOOKS = (
    "older than it seemed", "covered with dust", "still warm", "half hidden behind the door", "lighter than expected",
    "painted blue", "far too heavy to move", "of no use to anyone", "worth more than gold", "where it had been left",
    "damp from the fog", "beautifully made", "missing a screw", "familiar to everyone", "bent on one side",
)  # fmt: skip
WEATHER = (
    "a thin mist lay over the fields", "the wind had turned to the north", "the sun came out at last",
    "a light snow began to fall", "thunder could be heard beyond the hills", "the air smelled of hay",
    "the streets were wet and empty", "swallows crossed the pale sky", "the heat was hard to bear",
    "frost had drawn ferns on the windows", "the moon rose behind the chimneys", "a warm rain was falling",
)  # fmt: skip
OPINIONS = (
    "good work cannot be rushed", "nothing stays the same for long", "one must listen before speaking",
    "a small mistake can be a good teacher", "the old way was not always the better one",
    "most problems look smaller after breakfast", "it is better to ask twice than to guess once",
    "a promise should be written down", "strangers often notice what neighbours miss",
    "there is a reason behind every habit", "luck favours those who keep their tools clean",
    "a story grows whenever it is told", "silence can be a kind of answer", "everyone deserves a second chance",
)  # fmt: skip
RESULTS = (
    "nobody was surprised", "the plan had to be changed", "all was ready in time", "the matter was forgotten",
    "they decided to start again", "it took twice as long as expected", "the whole village talked about it",
    "a letter was sent the next day", "there was enough left for everyone", "the door stayed locked until spring",
    "the numbers finally agreed", "they laughed about it for years", "the work went on by lamplight",
)  # fmt: skip
NAMES = (
    "Agnes", "Bruno", "Clara", "Dmitri", "Elsa", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katja", "Leopold", "Mina",
    "Noor", "Oskar", "Petra", "Quentin", "Rosa", "Selim", "Tilda", "Ulrich", "Vera", "Wanda", "Xavier", "Yara", "Zeno",
)  # fmt: skip

TEMPLATES = (
    "{time}, {person} {deed} near {place}.",
    "{time}, {weather}, and {person} {deed}.",
    "{person} found {thing}, which was {look}.",
    "{name} used to say that {opinion}.",
    "When {person} {deed}, {result}.",
    "Nobody at {place} knew why {thing} was {look}.",
    "It was {name} who first {deed}, and {result}.",
    "{person} was {quality}, because {thing} was {look}.",
    "Although {weather}, {person} {deed} without complaint.",
    "{name} and {name2} {deed} together until {result}.",
    '"{opinion}," said {name}, looking at {thing}.',
    "Between {thing} and {thing2} there was hardly room for {person}.",
    "{time}, {name} came to {place} and asked about {thing}.",
    "If {person} had not {deed}, perhaps {name} would have done so.",
    "There are people who think that {opinion}; {name} was one of them.",
    "{person} moved {thing} closer to {thing2} and {deed}.",
    "For a while {weather}, and at {place} {person} {deed}.",
    "{name} remembered {thing}; it had been {look} even then.",
    "What {name} liked most about {place} was {thing}.",
    "{person} explained to {name} that {opinion}, but {name} was {quality}.",
    "Later {person} {deed} once more, and this time {result}.",
    "No one had touched {thing} since {name} left {place}.",
    "{time}, {person} and {name} disagreed about {thing}.",
    "Outside, {weather}; inside, {name} {deed}.",
    "The letter from {name} mentioned {thing}, {thing2} and little else.",
    "By the time {name} arrived, {person} had already {deed}.",
    "{thing} was {look}, so {person} borrowed another from {name}.",
    "{name} was {quality} and {deed} alone.",
    "Those who visited {place} always noticed {thing} first.",
    "{person} had a theory: {opinion}.",
    "In the end {result}, and {name} went home {quality}.",
    "{name} wrote down what {person} had said, namely that {opinion}.",
)

# A sentence starts with a capital, also behind an opening quote.
_SENTENCE_START = re.compile(r'^("?)([a-z])')


def paragraph(rng: random.Random) -> str:
    """Five to nine sentences about one scene, no template twice."""
    scene = rng.choice(SCENES)
    return " ".join(_sentence(template, scene, rng) for template in rng.sample(TEMPLATES, rng.randint(5, 9)))


def prose(seed: int, characters: int) -> str:
    """Paragraphs of at least `characters` characters in all, the same for the same seed.

    Raises
    ------
    ValueError
        If `characters` is negative.
    """
    if characters < 0:
        raise ValueError(f"characters must be at least 0, got {characters}")
    rng = random.Random(f"prose {seed}")
    parts: list[str] = []
    length = 0
    while length < characters:
        parts.append(paragraph(rng))
        length += len(parts[-1]) + 1
    return "\n".join(parts)


def _sentence(template: str, scene: Scene, rng: random.Random) -> str:
    name, second = rng.sample(NAMES, 2)
    thing, other = rng.sample(scene.things, 2)
    text = template.format(
        place=scene.place,
        person=rng.choice(scene.people),
        thing=thing,
        thing2=other,
        deed=rng.choice(scene.deeds),
        name=name,
        name2=second,
        time=rng.choice(TIMES),
        weather=rng.choice(WEATHER),
        opinion=rng.choice(OPINIONS),
        result=rng.choice(RESULTS),
        quality=rng.choice(QUALITIES),
        look=rng.choice(LOOKS),
    )
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)
