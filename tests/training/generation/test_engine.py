"""The rollout engine on one process: Hugging Face's tokens and log-probabilities, whatever the
cache, the batch and the order."""

import pytest
import torch

from tests.support import generation_models
from tests.support.bloom import tiny_bloom
from tests.support.generation_models import generate, prompts
from training.errors import ConfigError, NoRoom
from training.generation.block_manager import Pages
from training.generation.engine import Engine, EngineLimits
from training.generation.request import Request, Sampling, draws
from training.generation.scheduler import Scheduler

VOCAB, STEPS = 300, 16
SMALL = dict(page=4, rows=9, cache_tokens=64, prefill_tokens=13, min_prefill_tokens=20)
"""A cache for two or three rows, prompts in chunks, refills late."""


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """(Hugging Face's model, our decoder on its tensors), six heads: no power of two."""
    folder = tmp_path_factory.mktemp("bloom")
    # a tied one soon repeats itself
    model = tiny_bloom(folder, heads=6, hidden=48, vocab=VOCAB, tied=False)
    return model, generation_models.decoder(folder, model)


@pytest.fixture(scope="module")
def expected(bloom):
    """200 prompts, Hugging Face's greedy responses, and an EOS that ends a good part of them
    early."""
    asked = prompts(200, VOCAB, 40)
    free = [generation_models.greedy(bloom[0], prompt, STEPS, None) for prompt in asked]
    eos = max(range(VOCAB), key=lambda token: sum(token in row[1:-1] for row in free))
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert sum(len(row) < STEPS for row in cut) >= 20
    return asked, cut, eos


@pytest.fixture
def rash(monkeypatch):
    """Admission that expects nothing of the rows' growth, so that many are preempted."""
    monkeypatch.setattr(Scheduler, "_peak", lambda self, future: 0)


@pytest.mark.parametrize(
    ("limits", "late"), [({}, False), ({}, True), (SMALL, False), (SMALL, True), ({"rows": 1}, False)]
)
def test_greedy_equals_hugging_face_for_200_prompts(bloom, expected, rash, limits, late):
    """Whatever the cache holds and whenever results are read; in fp32."""
    asked, responses, eos = expected
    if "rows" in limits and limits["rows"] == 1:
        asked, responses = asked[:20], responses[:20]
    made, engine = generate(bloom[1], asked, Sampling(STEPS, temperature=0), eos, async_output=late, **limits)
    assert [one.tokens for one in made] == responses
    assert [one.reason for one in made] == ["eos" if row[-1] == eos else "length" for row in responses]
    if limits is SMALL:
        assert engine.stats.preemptions > 0
    assert (engine.stats.wasted > 0) == late


def test_logprobs_are_the_training_forward_s(bloom):
    """To 1e-4 in fp32, at temperature .7, against Hugging Face's forward pass of prompt and
    response together."""
    model, ours = bloom
    asked = prompts(12, VOCAB, 30, seed=1)
    made, _ = generate(ours, asked, Sampling(STEPS, temperature=0.7), uniforms=draws(1, 0, 12, STEPS))
    for prompt, one in zip(asked, made, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1] / 0.7
        theirs = logits.log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(one.logprobs), theirs, atol=1e-4)


def test_a_sample_depends_on_its_request_alone(bloom, expected, rash):
    """Not on its neighbours, the order, the cache, preemption, chunks of prefill, or on when
    results are read."""
    _, ours = bloom
    asked, uniforms = prompts(40, VOCAB, 40, seed=2), draws(seed=1, iteration=3, rows=40, steps=STEPS)
    sampling = Sampling(STEPS, temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    alone = [
        generate(ours, [prompt], sampling, expected[2], uniforms[row : row + 1])[0][0].tokens
        for row, prompt in enumerate(asked)
    ]
    assert len({len(tokens) for tokens in alone}) > 1, "some end early"
    for limits, late in (({}, False), (SMALL, True), ({"page": 8, "rows": 5}, True)):
        made, engine = generate(ours, asked, sampling, expected[2], uniforms, late, **limits)
        assert [one.tokens for one in made] == alone
    backwards, _ = generate(ours, asked[::-1], sampling, expected[2], uniforms.flip(0), **SMALL)
    assert [one.tokens for one in backwards] == alone[::-1]


def test_samples_of_one_prompt_share_its_pages_and_nothing_else(bloom):
    _, ours = bloom
    prompt, uniforms = prompts(1, VOCAB, 1)[0] * 21, draws(2, 0, 12, STEPS)
    sampling = Sampling(STEPS, temperature=1.0)
    alone = [generate(ours, [prompt], sampling, uniforms=uniforms[row : row + 1])[0][0].tokens for row in range(12)]
    for limits in ({"page": 4}, {**SMALL, "rows": 12}):
        made, engine = generate(ours, [prompt] * 12, sampling, uniforms=uniforms, **limits)
        assert [one.tokens for one in made] == alone
    pages = Pages(40, 4)
    scheduler = Scheduler([Request(prompt, sampling, None)] * 12, pages, 12)
    rows = scheduler.admit()
    # 21 + 16 tokens are 10 pages, 5 of them the prompt's: 5 + 12 * 5 would be more than 40; 7 rows
    # fit.
    assert len(rows) == 7 and all(row.pages[:5] == rows[0].pages[:5] for row in rows)
    assert len({page for row in rows for page in row.pages}) == 5 + 7
    for row in rows:
        row.tokens = [1]
        scheduler.finish(row, "stop")
    assert len(pages.unused) == 40 and not scheduler.prefixes


def test_stop_sequences_and_strings_end_a_response_and_stay_in_it(bloom, expected):
    _, ours = bloom
    asked, responses, eos = expected
    row = next(index for index, tokens in enumerate(responses) if len(set(tokens)) > 8)
    stop = tuple(responses[row][3:5])
    made, _ = generate(ours, asked[row : row + 1], Sampling(STEPS, temperature=0, stop=((999,), stop)), -1)
    first = next(end for end in range(2, STEPS + 1) if tuple(responses[row][end - 2 : end]) == stop)
    assert made[0].tokens == responses[row][:first] and made[0].reason == "stop"

    def decode(tokens):  # "<token>" each: texts that no single token makes
        return "".join(f"<{token}>" for token in tokens)

    text = f"{stop[0]}><{stop[1]}"
    made, _ = generate(
        ours, asked[row : row + 1], Sampling(STEPS, temperature=0, stop_strings=("never", text)), -1, decode=decode
    )
    assert made[0].tokens == responses[row][:first] and made[0].reason == "stop"


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_sampled(bloom, tmp_path):
    """Nor counted: log-probabilities are of the tokenizer's ids alone. Without the limit a third of
    the samples would have such ids."""
    model, tokens = bloom[0], 2 * VOCAB // 3
    model.save_pretrained(tmp_path)
    ours = generation_models.decoder(tmp_path, model, tokens=tokens)
    asked, sampling = prompts(20, tokens, 30, seed=4), Sampling(STEPS, temperature=2.0)
    responses, _ = generate(ours, asked, sampling, uniforms=draws(1, 0, 20, STEPS))
    assert max(max(one.tokens) for one in responses) < tokens
    for prompt, one in zip(asked, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1, :tokens] / 2
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(one.logprobs), expected, atol=1e-4)
    unlimited, _ = generate(bloom[1], asked, sampling, uniforms=draws(1, 0, 20, STEPS))
    assert any(max(one.tokens) >= tokens for one in unlimited)


def test_the_cases_at_the_edge(bloom):
    _, ours = bloom
    sampling = Sampling(4, temperature=0)
    assert generate(ours, [], sampling)[0] == []
    none, _ = generate(ours, [[5, 6]], Sampling(0, temperature=0))
    assert none[0] == ([], [], "length")
    # draws that greedy has no use for
    mixed = Engine(ours, EngineLimits(64), -1).generate(
        [Request([5], Sampling(0, temperature=0)), Request([5, 6], sampling), Request([5, 6], sampling, torch.rand(2))]
    )
    assert [len(one.tokens) for one in mixed] == [0, 4, 4] and mixed[1] == mixed[2]
    # All rows end at once, with the host a step behind: one prompt many times, no sample twice.
    made, engine = generate(ours, [[7, 8, 9]] * 20, sampling, async_output=True, rows=10)
    assert len({tuple(one.tokens) for one in made}) == 1 and engine.stats.tokens == 80
    (first,) = generate(ours, [[7, 8, 9]], sampling)[0]
    made, _ = generate(ours, [[7, 8, 9]] * 20, sampling, eos=first.tokens[1], async_output=True, rows=10)
    assert all(
        one.tokens == first.tokens[: first.tokens.index(first.tokens[1]) + 1] and one.reason == "eos" for one in made
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], Sampling(4, temperature=0)), "request 1: its prompt is empty; expected at least one token"),
        (
            Request([1] * 61, Sampling(4, temperature=0)),
            "request 1: 61 prompt tokens \\+ max_new_tokens 4 are more than .* context of 64",
        ),
        (Request([1, 300], Sampling(4, temperature=0)), "request 1: token 300 is outside the vocabulary 0..299"),
        (Request([1, -1], Sampling(4, temperature=0)), "request 1: token -1 is outside the vocabulary"),
        (Request([1], Sampling(4)), "request 1: 0 uniforms for max_new_tokens = 4; give one a step"),
        (
            Request([1], Sampling(4, temperature=0, stop_strings=("x",))),
            "request 1: stop_strings = \\('x',\\) need an engine made with decode",
        ),
    ],
)
def test_a_request_that_can_t_be_served_is_refused_before_anything_runs(bloom, request_, message):
    engine = Engine(bloom[1], EngineLimits(64, page=4, cache_tokens=40), -1)
    with pytest.raises(ConfigError, match=message):
        engine.generate([Request([1, 2], Sampling(2, temperature=0)), request_])
    assert engine.stats.steps == 0


def test_a_request_that_the_cache_can_t_hold_is_refused_before_anything_runs(bloom):
    engine = Engine(bloom[1], EngineLimits(64, page=4, cache_tokens=40), -1)
    with pytest.raises(
        NoRoom, match="request 1 needs 16 pages of 4 tokens, the cache has room for 10 .* raise cache_share"
    ):
        engine.generate([Request([1, 2], Sampling(2, temperature=0)), Request([1] * 60, Sampling(4, temperature=0))])
    assert engine.stats.steps == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens = -1: expected at least 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"top_p": 0.0}, "top_p = 0.0: expected above 0"),
        ({"top_k": -5}, "top_k = -5"),
        ({"stop": ((),)}, "stop"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**{"max_new_tokens": 4, **values})


def test_admission_expects_what_ended_rows_needed():
    """Full length at first; after responses of a quarter of it, room for more rows at once. Small
    refills wait."""

    def requests(count):
        return [Request([1] * 8, Sampling(24, temperature=0))] * count

    scheduler = Scheduler(requests(20), Pages(36, 4), 20)
    scheduler.repeated = set()
    first = scheduler.admit()
    assert len(first) == 4  # 32 tokens each are 8 pages, and a page more
    for row in first[:3]:
        row.tokens = [1] * 6
        scheduler.finish(row, "eos")
    assert scheduler.admit(min_tokens=100) == []
    # 8 + 1.1 * 6 tokens and a page: 8 rows, one of them running
    assert len(scheduler.admit(min_tokens=30)) == 7
    assert len(scheduler.running) == 8


@pytest.mark.parametrize("alike", [False, True])
def test_rows_are_admitted_at_once_where_their_longest_fits(alike):
    """The engine makes no larger cache: a margin beyond it would let one row wait for the others
    and run alone."""
    requests = [Request([5] * 9 if alike else [number] * 9, Sampling(7, temperature=0)) for number in range(8)]
    scheduler = Scheduler(requests, Pages(2 + 8 * 2 if alike else 8 * 4, 4), 8)
    assert len(scheduler.admit()) == 8


def test_admission_counts_that_rows_end_at_different_times():
    """Rows of 8 tokens that want 4, 8, 12, 16 and 20 more: 25 pages if each held its longest length
    to the end, and 21 are enough."""
    scheduler = Scheduler(
        [Request([1] * 8, Sampling(new, temperature=0)) for new in (4, 8, 12, 16, 20)], Pages(21, 4), 5
    )
    scheduler.repeated = set()
    rows = scheduler.admit()
    assert len(rows) == 5
    held = []
    while scheduler.running:
        assert scheduler.missing(scheduler.running) <= 0, "the cache never overflows"
        scheduler.prefill(1000)
        scheduler.step(scheduler.ready())
        held.append(scheduler.pages.count - len(scheduler.pages.unused))
        for row in list(scheduler.running):
            row.tokens.append(1)
            if len(row.tokens) == row.request.sampling.max_new_tokens:
                scheduler.finish(row, "length")
    assert max(held) <= 21 < sum(-(-row.longest // 4) for row in rows)
