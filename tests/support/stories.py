"""Stories, facts and questions written by a grammar: text to train and measure tiny models on.

A story keeps its people, things and places to the last sentence, so that a model has something to
remember; names and adjectives are drawn uniformly, so that not every next word is certain. Facts
never change, so that questions about them have answers that a model can know.
"""

import json
import re
from collections.abc import Iterator
from random import Random

GIRLS = (
    "Anna Clara Ella Emma Grace Ida Julia Lena Lily Lucy Maya Mia Nora Rosa Sara Sofia Zoe"
).split()
BOYS = "Adam Ben Carl Daniel Finn Henry Jack Leo Max Noah Oscar Paul Sam Theo Tim Tom Will".split()
GOOD = "brave bright careful clever friendly funny gentle happy honest kind patient quiet".split()
SIZE = "big little long old round shiny short small strange tall tiny young".split()
COLOUR = "black blue brown green grey orange pink purple red silver white yellow".split()
THINGS = (
    "apple bag ball basket bell blanket boat book bottle box brush bucket button cake candle chair "
    "clock coat coin cup doll drum flag flower flute hat jar key kite lamp leaf letter map "
    "mirror pencil "
    "pot ribbon ring rope shell shoe spoon stone table toy umbrella wagon whistle"
).split()
PLACES = {
    "at": "beach farm lake market mill river school station".split(),
    "in": (
        "barn castle cave city field forest garden house kitchen park town valley village"
    ).split(),
    "on": "bridge hill island meadow mountain road ship".split(),
}
GAMES = {
    "play": "played", "run": "ran", "sing": "sang", "dance": "danced", "read": "read",
    "swim": "swam", "climb": "climbed", "draw": "drew", "cook": "cooked", "dig": "dug",
    "sail": "sailed",
    "jump": "jumped", "paint": "painted", "walk": "walked", "whistle": "whistled", "build": "built",
}  # fmt: skip
WEATHER = {
    "rain": "everyone got wet", "snow": "the ground turned white", "wind": "the leaves flew away",
    "sun": "the day was warm", "fog": "nobody could see far", "storm": "the trees bent low",
}  # fmt: skip
TIMES = "morning afternoon evening night".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
FAMILY = "mother father sister brother aunt uncle grandmother grandfather teacher neighbour".split()
MORALS = (
    "It is good to share.",
    "A friend is worth more than gold.",
    "It is never too late to say sorry.",
    "Who asks for help will find it.",
    "Small hands can do great things.",
    "The truth is always the best way.",
    "Those who wait will be happy in the end.",
)
# subject: what it says, its young, where it lives, what it eats, its legs
ANIMALS = {
    "bear": ("growl", "cub", "cave", "honey", 4),
    "bee": ("buzz", "larva", "hive", "pollen", 6),
    "bird": ("tweet", "chick", "nest", "seeds", 2),
    "cat": ("meow", "kitten", "house", "mice", 4),
    "cow": ("moo", "calf", "barn", "grass", 4),
    "dog": ("woof", "puppy", "kennel", "bones", 4),
    "duck": ("quack", "duckling", "pond", "weeds", 2),
    "fox": ("yap", "kit", "den", "hens", 4),
    "frog": ("croak", "tadpole", "swamp", "flies", 4),
    "goat": ("bleat", "kid", "hill", "leaves", 4),
    "hen": ("cluck", "pullet", "coop", "corn", 2),
    "horse": ("neigh", "foal", "stable", "hay", 4),
    "lion": ("roar", "whelp", "desert", "zebras", 4),
    "mouse": ("squeak", "pinkie", "hole", "cheese", 4),
    "dove": ("coo", "squab", "tree", "moths", 2),
    "pig": ("oink", "piglet", "sty", "roots", 4),
    "sheep": ("baa", "lamb", "meadow", "clover", 4),
    "spider": ("nothing", "spiderling", "web", "gnats", 8),
}
ASKED = (
    ("What does a {} say?", "A {} says {}."),
    ("What is a young {} called?", "A young {} is called a {}."),
    ("Where does a {} live?", "A {} lives in a {}."),
    ("What does a {} like to eat?", "A {} likes to eat {}."),
    ("How many legs does a {} have?", "A {} has {} legs."),
)


class Writer:
    """Write stories, facts and questions from one seed."""

    def __init__(self, seed: int):
        self.rng = Random(seed)
        self.pick = self.rng.choice

    def story(self) -> str:
        """Return one story of two to five paragraphs, about 100 to 250 words."""
        girl = self.rng.random() < 0.5
        self.name, self.friend = self.rng.sample(GIRLS if girl else BOYS, 2)
        self.she, self.her = ("she", "her") if girl else ("he", "his")
        self.kind = "girl" if girl else "boy"
        self.who, self.animal = self.pick(FAMILY), self.pick(list(ANIMALS))
        self.thing, self.other = self.rng.sample(THINGS, 2)
        self.colour, self.size, self.good = self.pick(COLOUR), self.pick(SIZE), self.pick(GOOD)
        self.game = self.pick(list(GAMES))
        preposition = self.pick(list(PLACES))
        self.place = self.pick(PLACES[preposition])
        self.there = f"{preposition} the {self.place}"
        events = [self._finds, self._loses, self._meets, self._asks, self._counts, self._weather]
        chosen = self.rng.sample(events, self.rng.randint(1, 3))
        text = "\n".join([self._opening(), *(event() for event in chosen), self._ending()])
        return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)

    def _opening(self) -> str:
        first = self.pick([
            f"Once upon a time there was a {self.good} little {self.kind} named {self.name}.",
            f"Once upon a time, {self.there}, there lived a {self.good} {self.kind} named "
            f"{self.name}.",
            f"{self.name} was a {self.good} {self.kind} who lived with {self.her} {self.who}.",
            f"There was once a {self.kind} called {self.name}, and everyone said {self.she} "
            f"was {self.good}.",
        ])  # fmt: skip
        second = self.pick([
            f"{self.name} loved to {self.game} {self.there} with {self.her} {self.animal}.",
            f"Every {self.pick(TIMES)} {self.she} {GAMES[self.game]} {self.there}.",
            f"{self.She} had a {self.size} {self.colour} {self.thing} and took it everywhere.",
        ])  # fmt: skip
        return f"{first} {second}"

    def _finds(self) -> str:
        return self.pick([
            f"One {self.pick(TIMES)} {self.name} found a {self.size} {self.other} {self.there}. "
            f'"Whose {self.other} is this?" {self.she} asked. "It is mine," said the '
            f'{self.animal}. '
            f"So {self.name} gave the {self.other} back, and the {self.animal} was very happy.",
            f"On {self.pick(DAYS)}, {self.name} saw something {self.colour} under a stone. It "
            f"was a "
            f"{self.other}! {self.She} picked it up and showed it to {self.her} {self.who}. "
            f'"What a {self.size} {self.other}," said {self.her} {self.who}.',
        ])  # fmt: skip

    def _loses(self) -> str:
        hidden = ["behind the door", "under the bed", "near the water", "in the tall grass"]
        where = self.pick(hidden)
        return (
            f"But one {self.pick(TIMES)} the {self.colour} {self.thing} was gone. {self.name} "
            f"looked "
            f"everywhere and began to cry. {self.pick([self.friend, f'The {self.animal}'])} "
            f"came to help, "
            f"and they found the {self.thing} {where}. "
            f'"Thank you," said {self.name}. "I will be more careful now."'
        )

    def _meets(self) -> str:
        sound = ANIMALS[self.animal][0]
        return (
            f"{self.There}, {self.name} met a {self.pick(COLOUR)} {self.animal}. "
            f'"{sound.capitalize()}!" said the {self.animal}. It was hungry, so {self.she} '
            f"gave it some "
            f"{ANIMALS[self.animal][3]}. From that day on they {GAMES[self.game]} together."
        )

    def _asks(self) -> str:
        answer = self.pick([
            f'"Yes, but be {self.pick(GOOD)}," said {self.her} {self.who}.',
            f'"No, it is too late," said {self.her} {self.who}, and {self.name} was sad.',
            f'"Ask {self.friend} first," said {self.her} {self.who}. And {self.friend} said yes.',
        ])  # fmt: skip
        question = self.pick(["May I", "Can I", "Please, may I"])
        return f'"{question} {self.game} {self.there}?" asked {self.name}. {answer}'

    def _counts(self) -> str:
        first, more = self.rng.randint(1, 6), self.rng.randint(1, 6)
        one, two = (NUMBERS[n - 1] for n in (first, more))
        return (
            f"{self.friend} had {one} {self.other}{'s' * (first > 1)} and got {two} more. "
            f'"How many are there now?" asked {self.name}. '
            f'"There are {NUMBERS[first + more - 1]}," said {self.friend}.'
        )

    def _weather(self) -> str:
        kind = self.pick(list(WEATHER))
        return (
            f"Then the {kind} came, and {WEATHER[kind]}. {self.name} and {self.friend} went "
            f"home and "
            f"{GAMES[self.game]} until {self.pick(TIMES)}."
        )

    def _ending(self) -> str:
        return self.pick([
            f"{self.name} smiled and hugged {self.her} {self.who}. {self.pick(MORALS)}",
            f"And so {self.name}, {self.friend} and the {self.animal} became friends. The end.",
            f"That {self.pick(TIMES)} {self.name} went to bed with the {self.thing} and slept "
            f"well.",
            f'"{self.pick(MORALS)[:-1]}," said {self.her} {self.who}, and {self.name} never '
            f'forgot it.',
        ])  # fmt: skip

    @property
    def She(self) -> str:
        return self.she.capitalize()

    @property
    def There(self) -> str:
        return self.there.capitalize()

    def fact(self) -> tuple[str, str]:
        """Return a question about an animal, and its answer in a sentence."""
        animal, about = self.pick(list(ANIMALS)), self.rng.randrange(len(ASKED))
        question, answer = ASKED[about]
        return question.format(animal), answer.format(animal, ANIMALS[animal][about])

    def answered(self) -> str:
        """Return facts as `Question: ... Answer: ...`, the way of the ARC protocol."""
        pairs = (self.question() for _ in range(self.rng.randint(1, 4)))
        return "\n\n".join(f"Question: {q['question']}\nAnswer: {right(q)}" for q in pairs)

    def question(self, number: int = 0) -> dict:
        """Return a question of three to five choices about an animal, laid out as in ARC."""
        about = self.rng.randrange(len(ASKED))
        animal, values = self.pick(list(ANIMALS)), [str(a[about]) for a in ANIMALS.values()]
        answer = str(ANIMALS[animal][about])
        wrong = sorted(set(values) - {answer})
        texts = [*self.rng.sample(wrong, min(len(wrong), self.rng.randint(2, 4))), answer]
        return self._laid_out(number, ASKED[about][0].format(animal), answer, texts)

    def sum_question(self, number: int = 0) -> dict:
        """Return a question of four choices about a sum, in words that a story uses."""
        first, more = self.rng.randint(1, 6), self.rng.randint(1, 6)
        one, two, answer = (NUMBERS[n - 1] for n in (first, more, first + more))
        wrong = self.rng.sample(sorted(set(NUMBERS) - {answer}), 3)
        asked = f"There were {one} and {two} more. How many are there now?"
        return self._laid_out(number, asked, answer, [*wrong, answer])

    def _laid_out(self, number: int, asked: str, answer: str, texts: list[str]) -> dict:
        self.rng.shuffle(texts)
        labels = ("12345" if number % 4 == 3 else "ABCDE")[: len(texts)]
        return {
            "id": f"Stories_{number}",
            "question": asked,
            "choices": {"text": texts, "label": list(labels)},
            "answerKey": labels[texts.index(answer)],
        }


def right(question: dict) -> str:
    """Return the text of a question's right choice."""
    choices = question["choices"]
    return choices["text"][choices["label"].index(question["answerKey"])]


def stories(seed: int) -> Iterator[str]:
    """Write stories without end."""
    writer = Writer(seed)
    while True:
        yield writer.story()


def held_out_text(characters: int = 60_000) -> str:
    """Return stories that no model was trained on."""
    text, writer = "", stories(seed=10_001)
    while len(text) < characters:
        text += next(writer) + "\n\n"
    return text[:characters]


def held_out_questions(count: int = 120, *, long: bool = False) -> str:
    """Return questions as the lines of an ARC file, half of them of facts, half of sums.

    The models know the facts, but cannot add. `long` questions have a story before them.
    """
    writer = Writer(seed=10_002 + long)
    kinds = (writer.question, writer.sum_question)
    found = [kinds[number % 2](number) for number in range(count)]
    if long:
        stories_ = [writer.story() for _ in found]
        found = [
            {**q, "id": f"Long_{q['id']}", "question": f"{story}\n{q['question']}"}
            for q, story in zip(found, stories_, strict=True)
        ]
    return "".join(json.dumps(question) + "\n" for question in found)
