"""The words that the tasks are made of: keys that name something once, invented words, and identifiers."""

from __future__ import annotations

import random
import uuid


def listed(words: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(words.split())


ADJECTIVES = listed(
    """amber ancient bitter blue bold brave brief bright brisk broad bronze calm clever cold coral cosy crimson curly
damp dark deep distant dry dusty eager early east empty even faint fair famous fast fierce fine firm flat fond
free fresh gentle giant glad golden grand grave green grey happy hard heavy hidden hollow honest humble icy idle
ivory jolly keen kind large late lazy light little lively lonely long loud loyal lucky mellow merry mild misty
modest narrow neat noble north odd old open pale patient plain polite proud pure quick quiet rapid rare ready red
rich ripe rough round royal rural rusty sandy scarlet secret sharp short shy silent silver simple slim slow small
smooth soft solid south steady steep stern strange strong sunny sweet swift tall tame thick thin tidy tiny tough
urban vast violet warm west wide wild windy wise wooden young"""
)

NOUNS = listed(
    """acorn anchor apple arrow badger bakery barley barn basin basket beacon bell birch blanket boat bottle bridge
broom brush bucket button cabin candle canyon carpet castle cedar cellar chapel cherry chimney cliff clock clover coach
cobbler comet copper cottage cradle crane creek curtain daisy desert dolphin donkey drawer drum eagle elbow engine
falcon feather fence ferry fiddle field finch flute forest fountain fox garden garlic gate ginger glacier goblet
goose granite grape hammer harbour harvest hazel hedge helmet heron hill honey island ivy jacket jaguar jar kettle
kitchen kite ladder lagoon lamp lantern lemon lily lobster lodge magnet maple market meadow melon mill mirror
mitten mountain mustard needle nest oak oasis orchard otter oven owl oyster paddle palace parrot pasture pebble
pepper pigeon pillow pine planet pocket pond poplar prairie pumpkin quarry quilt rabbit raven reef ribbon river
rocket saddle salmon sandal shelf shepherd shore sparrow spoon spring stable station stove summit swan table
teapot temple thistle thunder ticket tiger timber tower trumpet tulip tunnel turnip valley vessel village violin
wagon walnut water wheel willow window winter wolf yard zebra"""
)

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def keys(rng: random.Random, count: int) -> list[str]:
    """Return different names for things, like ``amber-harbour``.

    Raises:
        ValueError: there are fewer, some thirty thousand.
    """
    picked = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n % len(ADJECTIVES)]}-{NOUNS[n // len(ADJECTIVES)]}" for n in picked]


def plain_words(rng: random.Random, count: int) -> list[str]:
    """Return different English words, or names of two words where there are not enough of one."""
    single = sorted({*ADJECTIVES, *NOUNS})
    return rng.sample(single, count) if count <= len(single) else keys(rng, count)


def coded_words(rng: random.Random, count: int, length: int = 6) -> list[str]:
    """Return different invented words of `length` letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = (rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(length))
        found["".join(letters)] = None
    return list(found)


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Return different numbers of so many digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
