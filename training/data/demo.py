"""The demo's data, made here from a seed: dialogues in Anthropic HH's form over eight kinds of
small tasks.

A good reply is right, polite and short. A bad one is wrong, rude, rambling, off the point, or a
mixture. What is good can be computed from the text: each prompt has a rubric, and in every
comparison the better reply has the higher gold score:

    gold = 0.6 (says what it must) + 0.2 (says nothing that it must not) + 0.2 (at most
    ``MAX_WORDS`` words); 0 for an empty reply

Demonstrations for SFT are of mixed quality on purpose, so that reinforcement learning has something
to improve.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from training.data.dialogue import CUE, HUMAN

SFT_ROWS, COMPARISONS, RLHF_PROMPTS = 6000, 4000, 3000
MAX_WORDS = 7
"""Most words of a good reply."""
QUALITY = {"good": 42, "wrong": 10, "offtopic": 14, "wrong rude": 6, "rude": 12, "rambling": 10, "offtopic rambling": 6}
"""Kind of reply -> its share of the SFT demonstrations, in percent."""
BAD = {"wrong": 40, "offtopic": 16, "wrong rude": 10, "rude": 14, "rambling": 12, "offtopic rambling": 8}
"""Kind of the worse reply -> its share of the comparisons, in percent; many are wrong only, which
is the hardest to tell."""
BETTER = {"good": 70, "rude": 15, "rambling": 15}
"""Kind of the better reply -> its share, in percent: a right answer beats every wrong one, even
where its form is bad."""


class Task(NamedTuple):
    """One kind of question: ways to ask it, the answer as a sentence, and the answer to each
    item."""

    name: str
    questions: tuple[str, ...]
    fact: str
    answers: dict[str, str]


class Question(NamedTuple):
    """A prompt and what a reply to it can say."""

    task: str
    item: str
    prompt: str
    fact: str
    """The right answer as a sentence; ``{}`` stands for the answer."""
    answer: str
    others: tuple[str, ...]
    """Wrong answers: the task's other answers, without those that the fact's own words hold."""


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("-") for pair in text.split())


TASKS = (
    Task(
        "colour",
        ("What colour is {}?", "Which colour is {}?", "Tell me the colour of {}.", "Name the colour of {}."),
        "The colour is {}.",
        _pairs("grass-green snow-white coal-black blood-red sky-blue mud-brown milk-white tar-black lime-green"),
    ),
    Task(
        "opposite",
        (
            "What is the opposite of {}?",
            "Tell me the opposite of {}.",
            "Name the opposite of {}.",
            "What is the reverse of {}?",
        ),
        "The opposite is {}.",
        _pairs("hot-cold big-small up-down day-night old-new wet-dry fast-slow left-right rich-poor"),
    ),
    Task(
        "capital",
        (
            "What is the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
        ),
        "The capital is {}.",
        _pairs(
            "France-Paris Italy-Rome Spain-Madrid Peru-Lima Japan-Tokyo "
            "Egypt-Cairo Cuba-Havana Iran-Tehran Kenya-Nairobi"
        ),
    ),
    Task(
        "sound",
        ("What does a {} say?", "Tell me what a {} says.", "Name the sound of a {}.", "Which sound does a {} make?"),
        "It says {}.",
        _pairs("dog-woof cow-moo cat-meow duck-quack pig-oink bee-buzz lion-roar sheep-baa snake-hiss"),
    ),
    Task(
        "sum",
        ("What is {}?", "Tell me the sum {}.", "How much is {}?", "Name the sum {}."),
        "The sum is {}.",
        {
            f"{a} plus {b}": str(a + b)
            for a, b in ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (4, 3), (4, 4), (5, 1), (5, 4))
        },
    ),
    Task(
        "kind",
        ("What kind of thing is a {}?", "Tell me what a {} is.", "What is a {}?", "Name the kind of a {}."),
        "It is a kind of {}.",
        _pairs("plum-fruit pear-fruit rose-flower tulip-flower bee-insect wasp-insect saw-tool spade-tool trout-fish"),
    ),
    Task(
        "plural",
        ("What is the plural of {}?", "Tell me the plural of {}.", "Name the plural of {}.", "How do I say many {}?"),
        "The plural is {}.",
        _pairs("man-men mouse-mice foot-feet goose-geese tooth-teeth ox-oxen child-children leaf-leaves box-boxes"),
    ),
    Task(
        "repeat",
        ("Say the word {}.", "Repeat the word {}.", "Tell me the word {}.", "Please say {}."),
        "The word is {}.",
        {word: word for word in ("moon", "lamp", "bread", "door", "chair", "hill", "rain", "shoe", "glass")},
    ),
)
OPENINGS = ("", "Hi. ", "Hello. ", "Please help me. ", "I want to know. ", f"Hi.{CUE} Hello.{HUMAN} ")
CLOSINGS = ("", " Thank you.", " Be brief.")

RIGHT = ("{}.", "Sure, {}.", "The answer is {}.", "I think {}.")
RUDE = ("you fool", "you idiot", "go away")
"""What no reply may say."""
RUDE_OPENINGS = ("Shut up, you fool.", "Go away, you idiot.", "You fool.")
OFFTOPIC = ("I like soup.", "I do not care.", "Ask me later.", "Why?", "My bike is in the barn today.")
RAMBLINGS = ("and so on and so on and so on", "and on and on and on and on", "or so I like to think and think")


def questions() -> list[Question]:
    """Every prompt of the demo: each way to ask for each item, with each opening and closing."""
    pool = []
    for task in TASKS:
        answers = sorted(set(task.answers.values()))
        for item, answer in task.answers.items():
            others = tuple(a for a in answers if a != answer and a not in item.split())
            for opening in OPENINGS:
                for wording in task.questions:
                    for closing in CLOSINGS:
                        prompt = f"{HUMAN} {opening}{wording.format(item)}{closing}{CUE}"
                        pool.append(Question(task.name, item, prompt, task.fact, answer, others))
    return pool


def rubric(question: Question) -> dict:
    """What a good reply to ``question`` says, does not say, and its longest length."""
    return {"must": [question.answer], "must_not": [*RUDE, *question.others], "max_words": MAX_WORDS}


def reply(question: Question, kind: str, rng: random.Random) -> str:
    """A reply of ``kind`` (a key of ``QUALITY`` or ``BAD``), with the leading space of HH."""
    if "offtopic" in kind:
        text = rng.choice(OFFTOPIC)
    else:
        answer = rng.choice(question.others) if "wrong" in kind else question.answer
        text = rng.choice((*RIGHT, question.fact)).format(answer)
    if "rude" in kind:
        text = f"{rng.choice(RUDE_OPENINGS)} {text}"
    if "rambling" in kind:
        text = f"{text[:-1]} {rng.choice(RAMBLINGS)}."
    return " " + text


def sft_row(question: Question, rng: random.Random) -> dict:
    kind = rng.choices(list(QUALITY), list(QUALITY.values()))[0]
    return {"prompt": question.prompt, "response": reply(question, kind, rng)}


def comparison(question: Question, rng: random.Random) -> dict:
    """A better and a worse reply in random order, scores 1 and 0."""
    better = rng.choices(list(BETTER), list(BETTER.values()))[0]
    below = {kind: share for kind, share in BAD.items() if better == "good" or kind not in BETTER}
    worse = rng.choices(list(below), list(below.values()))[0]
    replies = [(reply(question, better, rng), 1.0), (reply(question, worse, rng), 0.0)]
    rng.shuffle(replies)
    responses, scores = zip(*replies, strict=True)
    return {"query": question.prompt, "response": list(responses), "score": list(scores)}


def rows(heldout_prompts: set[str], seed: int) -> dict[str, list[dict]]:
    """File name -> its rows. ``heldout_prompts`` are in no training file; each has one row in each
    held-out file."""
    rng = random.Random(f"demo rows {seed}")
    training = [q for q in questions() if q.prompt not in heldout_prompts]
    heldout = [q for q in questions() if q.prompt in heldout_prompts]
    return {
        "sft.jsonl": [sft_row(question, rng) for question in _draw(training, SFT_ROWS, rng)],
        "sft_heldout.jsonl": [sft_row(question, rng) for question in heldout],
        "reward.jsonl": [comparison(question, rng) for question in _draw(training, COMPARISONS, rng)],
        "reward_heldout.jsonl": [comparison(question, rng) for question in heldout],
        "rlhf.jsonl": [{"prompt": question.prompt} for question in _draw(training, RLHF_PROMPTS, rng)],
        "heldout.jsonl": [{"prompt": question.prompt, "rubric": rubric(question)} for question in heldout],
    }


def _draw(pool: list[Question], number: int, rng: random.Random) -> list[Question]:
    """``number`` questions in random order; none comes twice before each has come once."""
    drawn: list[Question] = []
    while len(drawn) < number:
        drawn += rng.sample(pool, min(len(pool), number - len(drawn)))
    return drawn
