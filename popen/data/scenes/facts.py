"""What one knows about things: what they are for, what is in them, what they are made of."""

from __future__ import annotations

from popen.data.scenes.kinds import KINDS


def family(*names: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if KINDS[kind].family in names)


EDIBLE = family("fruit", "vegetable")

# What one wants to do -> the kinds of things it takes.
USES: dict[str, tuple[str, ...]] = {
    "eat soup": ("bowl", "spoon"),
    "eat cereal with milk": ("bowl", "spoon"),
    "eat a steak": ("fork", "knife"),
    "eat pasta": ("fork", "bowl"),
    "cut some bread": ("knife",),
    "drink hot tea": ("cup",),
    "stir my coffee": ("spoon", "cup"),
    "pour a cold drink": ("bottle", "cup"),
    "cut a piece of paper": ("scissors",),
    "make a paper star": ("scissors", "pencil"),
    "write a letter": ("pencil",),
    "do my homework": ("pencil", "book"),
    "drive a nail into the wall": ("hammer",),
    "read a story": ("book",),
    "call a friend": ("phone",),
    "know what time it is": ("clock", "phone"),
    "wake up early": ("clock", "phone"),
    "play with a small child": ("ball", "car"),
    "play in the garden": ("ball",),
    "make a fruit salad": family("fruit"),
    "cook a vegetable soup": family("vegetable"),
    "make lemonade": ("lemon", "bottle"),
    "set the table for dinner": ("fork", "knife", "spoon", "bowl", "cup"),
}

# (wordings of the question, kinds it is true of)
Fact = tuple[tuple[str, ...], tuple[str, ...]]

NUTRITION: tuple[Fact, ...] = (
    (("which of these is rich in potassium?", "what would give me a lot of potassium?"), ("banana",)),
    (("which of these is full of vitamin c?", "what tastes very sour?"), ("lemon",)),
    (
        (
            "which of these is rich in vitamin a?",
            "what is good for my eyes?",
            "what could i give to a rabbit?",
        ),
        ("carrot",),
    ),
    (("which of these has vitamin d in it?", "what grows in the dark forest?"), ("mushroom",)),
    (
        ("what tastes sweet and is good for me?", "which of these is a sweet and healthy snack?"),
        ("apple", "banana", "pear"),
    ),
    (("which of these is full of fibre and has seeds inside?",), ("apple", "pear")),
    (
        ("what can i eat here?", "i am hungry. what is there to eat?", "which things on the table are food?"),
        EDIBLE,
    ),
    (("which fruit do you see?", "what would you buy in a fruit shop?"), family("fruit")),
    (("which vegetables do you see?", "what would you put in a vegetable soup?"), family("vegetable")),
)

DANGER: tuple[Fact, ...] = (
    (
        ("what is sharp?", "which things could cut my finger?", "what has a sharp edge?"),
        ("knife", "scissors"),
    ),
    (
        ("what should a baby not touch?", "which things are dangerous for a small child?"),
        ("knife", "scissors", "hammer", "fork"),
    ),
    (
        ("what would break into pieces if it fell?", "what could break on the floor?"),
        ("bottle", "cup", "bowl"),
    ),
    (("what would hurt if it fell on my foot?", "which heavy thing could break a toe?"), ("hammer",)),
    (("what would catch fire first?", "which things burn easily?"), ("pencil", "book")),
)

MATERIAL: tuple[Fact, ...] = (
    (
        ("what is made of metal?", "which things would a magnet pull?"),
        ("fork", "knife", "spoon", "hammer", "scissors"),
    ),
    (("what is made of glass?", "which things could i bring to the glass bin?"), ("bottle",)),
    (("what is made of paper?", "which things must not get wet?"), ("book",)),
    (("what is made of wood?", "what was made from a tree?"), ("pencil", "book")),
    (("what is made of clay?", "what was made in a hot oven?"), ("cup", "bowl")),
    (("what needs a battery?", "which things run on power?"), ("phone", "clock")),
    (("what is made of rubber?", "what is full of air?"), ("ball",)),
    (("what has wheels?",), ("car",)),
)
