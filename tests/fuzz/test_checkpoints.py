"""Damaged checkpoint folders: each is taken in, or refused in one line. No traceback, hang or
growth."""

import json
import os
import random
import shutil
import struct
import sys
from collections import Counter

import pytest

from conversion import hf_to_megatron, huggingface, small_files
from eval.answers import chat, generation
from eval.errors import DataError
from launcher.checks import weights
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_text, peak_mb, within
from training.config.data import ModelConfig
from training.config.shape import Shape, check_language_model
from training.data import demo_model, trial
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError
from training.files.special_tokens import SpecialTokens

TEXT = "\n\nHuman: What is 12 plus 345?\n\nAssistant: It's 357, of course. I'll say it's so! 2024-01-02\n"
INDEX = "model.safetensors.index.json"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    INDEX,
    "model.safetensors",
)
NUMBER, BY_TRANSFORMERS = 2500, 60
"""Damaged folders; and how many of them transformers loads, too (each takes it .1 s)."""
SECONDS, MB, LINE = 5, 150, 1500
"""Of one folder: longest time, most growth of memory over all of them; characters of the longest
error."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """family -> folder with each of FILES."""
    folders = {}
    for family in ("bloom", "llama"):
        folder = folders[family] = tmp_path_factory.mktemp(family)
        model = ModelConfig(demo_family=family, demo_vocab=280, demo_layers=1, demo_hidden=8, demo_heads=2)
        demo_model.write(folder, [TEXT] * 50, model, 0)
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folders


def header_of(folder):
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def damage(rng, folder, name):
    """Damage the folder's file ``name`` (an index is made first: of the one file, as a set of
    shards)."""
    path = folder / name
    if name == "model.safetensors":
        header, body = header_of(folder)
        text = damaged_text(rng, header)
        length = rng.choice((len(text),) * 20 + (0, 1, len(text) + len(body), 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + text + rng.choice((body,) * 8 + (b"", body[:-1], body + b"0")))
    elif name == INDEX:
        places = dict.fromkeys(header_of(folder)[0], rng.choice(("model.safetensors", "part.safetensors")))
        places.pop("__metadata__", None)
        if "part.safetensors" in places.values():
            (folder / "model.safetensors").rename(folder / "part.safetensors")
        path.write_bytes(damaged_text(rng, {"metadata": {}, "weight_map": places}))
    else:
        path.write_bytes(damaged_text(rng, json.loads(path.read_text())))


def restore(folder, original, names):
    for name in {*names, "part.safetensors", INDEX, "model.safetensors"}:
        (folder / name).unlink(missing_ok=True)
        if (original / name).exists():
            shutil.copyfile(original / name, folder / name)


def take_in(folder):
    """All that plan and the stages do with a folder's files before the weights themselves are
    read."""
    shape = Shape.read(folder)
    check_language_model(folder, shape)
    SpecialTokens.read(folder, shape.vocab)
    weights.check_checkpoint(folder, shape)
    tokenizer = Tokenizer(folder)
    tokenizer.highest()
    tokenizer.encode(TEXT)
    trial.check_files(tokenizer, folder, shape.vocab, [*trial.SAMPLES])
    huggingface.read(folder, shape)
    hf_to_megatron.check_tokenizer(folder, shape.vocab)
    small_files.check(folder, shape)


def each_alone(folder):
    """The same, whatever came before: a stage may be started by hand."""
    yield lambda: huggingface.read(folder, Shape.read(folder))
    yield lambda: Tokenizer(folder).encode(TEXT)
    yield lambda: chat.read(folder)
    yield lambda: generation.require_model(folder, "x")


def refusal(folder, attempt, what):
    """The error's text, "" where there was none. Fails for another error, and for more than a
    line."""
    try:
        with within(SECONDS):
            attempt()
    except (ConfigError, DataError) as error:
        text = str(error)
        assert text.isprintable() and len(text) < LINE, (what, text)
        assert str(folder) in text, (what, text)
        return text
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return ""


def test_damaged_folders_are_refused_in_a_line(sound, tmp_path, capfd):
    for family, original in sound.items():
        shutil.copytree(original, tmp_path / family)
        assert not refusal(tmp_path / family, lambda at=tmp_path / family: take_in(at), "sound")
    outcomes, before = Counter(), peak_mb()
    for number in range(NUMBER):
        rng = random.Random(number)
        family = rng.choice(sorted(sound))
        folder, names = tmp_path / family, rng.sample(FILES, rng.choice((1, 1, 1, 2)))
        if "model.safetensors" in names and INDEX in names:
            names.remove(INDEX)
        for name in names:
            damage(rng, folder, name)
        attempts = (lambda at=folder: take_in(at), *each_alone(folder))
        texts = [refusal(folder, attempt, (number, family, names)) for attempt in attempts]
        outcomes["refused" if texts[0] else "taken in"] += 1
        if number % (NUMBER // BY_TRANSFORMERS) == 0:
            refusal(folder, lambda at=folder: generation.load(at), (number, family, names))
        restore(folder, sound[family], names)
    sys.__stdout__.flush()
    capfd.readouterr()
    grown = peak_mb() - before
    print(f"{NUMBER} damaged folders: {dict(outcomes)}; memory grew by {grown:.0f} MB")
    assert outcomes["refused"] > NUMBER / 3 and outcomes["taken in"] > NUMBER / 20, outcomes
    assert grown < MB, grown


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "away", "secret", "huge"])
def test_what_is_no_file_of_the_folder_is_named(sound, tmp_path, kind):
    """Pipes, devices, links: a file of each name in turn."""
    folder, secret = tmp_path / "m", tmp_path / "secret"
    secret.write_text('{"a": 1}')
    for name in FILES:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound["llama"], folder)
        (folder / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        elif kind == "huge":
            with open(folder / name, "wb") as file:
                file.truncate(2**36)
        else:
            (folder / name).symlink_to({"device": "/dev/zero", "loop": name, "away": "nowhere", "secret": secret}[kind])
        text = refusal(folder, lambda: take_in(folder), (kind, name))
        assert "outside the folder" in text if kind == "secret" and name != "model.safetensors" else text, (kind, name)
        for attempt in each_alone(folder):
            refusal(folder, attempt, (kind, name))


def test_mutators_are_seeded_and_leave_their_input_alone():
    value = {"a": [1, {"b": "text"}], "c": None}
    before = json.dumps(value)
    for number in range(300):
        first, again = (damaged_text(random.Random(number), value) for _ in range(2))
        assert first == again and json.dumps(value) == before
    assert damaged_bytes(random.Random(1), b"") == damaged_bytes(random.Random(1), b"")
    assert damaged_json(random.Random(2), value) != value
