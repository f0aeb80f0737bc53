"""The words that the model of make_model.py knows, and the prompts that quickstart sends."""

import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = """
a about above across after again air all along and animal answer apple around as ask at away back
bank barn be bell below bird black blue boat book bread bridge bring brook brown build but by cabin
call candle carry castle cat chair child circle city clear climb cloud coat cold come cook copper
corn cover cross dark day deep deer dinner dog door down dream drink drive dry eagle early earth
east edge egg end engine evening every eye far farm fast father feather field fire fish floor flower
fly follow food for forest four fox friend from garden gate gentle glass go gold good grain grass
green ground grow hand harbor hat hear heavy help high hill hold home honey horse house in iron is
island it jump keep key king kitchen ladder lake lamp land large last late leaf learn left letter
light like line lion listen little long look low lunch make many map market meadow memory milk mill
mirror moon morning mother mountain mouse mouth music name near needle nest never new night north
not ocean of old olive on open orange other out over owl paper path peach people pepper piano
picture plain plant play pocket pond quick quiet rabbit rain read red rest rider river road rock
roof room rope rose round sail salt sand saw school sea seed shadow sheep shell ship shore short
silver sing sister sit sleep slow small snow soft song south spoon spring stand star stone storm
story street summer sun swan table tall tell the their there they thin thread three through ticket
tiger time to today together tower train travel tree turn two under until up valley very village
visit voice wagon walk wall warm was watch water wave west wheat wheel when where white wide wild
wind window winter wolf wonder wood word work write yellow you young
""".split()

DISTINCT = 5
SHARING = 3


@dataclass(frozen=True)
class Prompt:
    """One request: its text, and the name of the long prefix that it starts with."""

    name: str
    prefix: str
    text: str
    first: bool
    """Nothing sent before has this prefix: only such rows can show what Pillion did."""


def sentences(topic: str, words: int) -> str:
    """The same `words` words of plain text for the same topic, on every machine."""
    rng = random.Random(f"pillion {topic}")
    parts: list[str] = []
    while words > 0:
        length = min(words, rng.randint(6, 14))
        parts.append(" ".join(rng.choices(WORDS, k=length)) + ".")
        words -= length
    return " ".join(parts)


def quickstart_prompts(count_tokens: Callable[[str], int], longest: int) -> list[Prompt]:
    """Five prompts with prefixes of their own, then three that share a sixth.

    `longest` bounds a prompt's length in tokens; the lengths differ, and are no multiples of a block.
    """
    per_word = count_tokens(sentences("length", 400)) / 400
    made = []

    def document(topic: str, share: float) -> str:
        return sentences(topic, int(longest * share / per_word))

    for number in range(DISTINCT):
        name = "ABCDE"[number]
        text = f"{document(name, 0.95 - 0.06 * number)} what is {WORDS[31 * number]} like? it is"
        made.append(Prompt(name, name, text, first=True))
    shared = document("shared", 0.8)
    for number in range(SHARING):
        text = f"{shared} {sentences(f'question {number}', 12)} they tell you to"
        made.append(Prompt(f"S{number + 1}", "S", text, first=number == 0))
    return made
