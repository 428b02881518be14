"""The engine's bookkeeping against a loop over one request: a model whose logits are a hash of what
it finds in the cache's pages, for random prompts, groups, limits, stops and sampling, in random
caches. A page, a draw or a token of another row changes every later one."""

import random
from types import SimpleNamespace

import torch

from training.generation.engine import Engine, EngineLimits
from training.generation.request import Request, Sampling, draws
from training.generation.sampling import choose, penalise
from training.generation.scheduler import Scheduler

VOCAB, EOS = 23, 3


def logits_after(tokens: list[int]) -> torch.Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


def text(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


class Recorder:
    """A decoder: its keys are the tokens, its values their positions."""

    layers = kv_heads = head_dim = 1
    dtype, device, vocab, group, ops = torch.float64, torch.device("cpu"), VOCAB, None, SimpleNamespace(choose=choose)

    def prefill(self, tokens, cache, batch) -> list[list[int]]:
        cache[0, 0, batch.pages, 0, batch.offsets, 0] = tokens.double()
        cache[0, 1, batch.pages, 0, batch.offsets, 0] = batch.position.double()
        found = []
        for table, length in zip(batch.table, batch.lengths.tolist(), strict=True):
            pages = table[: -(-length // cache.size(4))].long()
            assert (pages > 0).all(), "page 0 is no one's"
            keys, values = (part[pages, 0].reshape(-1)[:length].long().tolist() for part in cache[0])
            assert values == list(range(length)), "another row's page, or one not filled yet"
            found.append(keys)
        return found

    def last_hidden(self, tokens, cache, batch) -> torch.Tensor:
        return torch.stack([logits_after(found) for found in self.prefill(tokens, cache, batch)])

    def logits(self, hidden):
        return hidden


def alone(request: Request) -> tuple[list[int], str]:
    """The response to one request, step by step."""
    asked, tokens = request.sampling, []
    while len(tokens) < asked.max_new_tokens:
        whole = [*request.prompt, *tokens]
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, whole] = True
        logits = penalise(logits_after(whole)[None], seen, torch.tensor([asked.repetition_penalty]))
        token, _ = choose(
            logits,
            torch.tensor([asked.temperature]),
            request.uniforms[len(tokens)][None],
            torch.tensor([asked.top_k]),
            torch.tensor([asked.top_p]),
        )
        tokens.append(int(token))
        if tokens[-1] == EOS:
            return tokens, "eos"
        if any(tuple(tokens[-len(stop) :]) == stop for stop in asked.stop) or any(
            words in text(tokens) for words in asked.stop_strings
        ):
            return tokens, "stop"
    return tokens, "length"


def requests(dice: random.Random, seed: int) -> list[Request]:
    """Groups of samples of a prompt, neighbours or not, some with other limits; now and then a
    prompt far longer than the others."""
    count, longest, most, group = (
        dice.choice((1, 5, 12, 30)),
        dice.choice((1, 10, 40)),
        dice.choice((1, 4, 12, 40)),
        dice.choice((1, 1, 4)),
    )
    prompts = [[dice.randrange(VOCAB) for _ in range(dice.randint(1, longest))] for _ in range(-(-count // group))]
    order = [prompts[number // group] for number in range(count)]
    if dice.random() < 0.3:
        dice.shuffle(order)
    if dice.random() < 0.2:
        order[dice.randrange(count)] = [dice.randrange(VOCAB) for _ in range(90)]
    alike, uniforms, made = dice.random() < 0.5, draws(seed, 0, count, most), []
    for prompt, row in zip(order, uniforms, strict=True):
        sampling = Sampling(
            most if alike else dice.choice((0, 1, dice.randint(0, most), most)),
            dice.choice((0, 0.7, 1.0)),
            dice.choice((0, 0, 3)),
            dice.choice((1.0, 1.0, 0.8)),
            dice.choice((1.0, 1.0, 1.3)),
            dice.choice(((), ((5,), (1, 2)))),
            dice.choice(((), ("cd", "a"))),
        )
        made.append(Request(prompt, sampling, row))
    return made


def test_every_response_is_its_request_s_alone_and_every_page_comes_back(monkeypatch):
    schedulers, admit, peak, preemptions = [], Scheduler.admit, Scheduler._peak, 0
    monkeypatch.setattr(Scheduler, "admit", lambda self, *least: (schedulers.append(self), admit(self, *least))[1])
    for seed in range(60):
        dice = random.Random(seed)
        asked = requests(dice, seed)
        expected = [alone(request) for request in asked]
        for _ in range(2):
            # rash: admission that expects no growth
            page, rash = dice.choice((1, 4, 7, 32)), dice.random() < 0.4
            least = max(-(-(len(one.prompt) + one.sampling.max_new_tokens) // page) for one in asked)
            limits = EngineLimits(
                130,
                dice.choice((1, 3, 512)),
                cache_tokens=dice.choice((0, page * (least + dice.choice((0, 1, 3, 10))))),
                expected_fraction=dice.choice((0.0, 0.1, 1.0)),
                page=page,
                prefill_tokens=dice.choice((1, 13, 8192)),
                min_prefill_tokens=dice.choice((0, 20, 1024)),
            )
            monkeypatch.setattr(Scheduler, "_peak", (lambda self, future: 0) if rash else peak)
            schedulers.clear()
            engine = Engine(Recorder(), limits, EOS, text, async_output=dice.random() < 0.5)
            assert [(one.tokens, one.reason) for one in engine.generate(asked)] == expected, (seed, limits)
            for scheduler in schedulers[-1:]:
                assert len(scheduler.pages.unused) == scheduler.pages.count and not any(scheduler.pages.holders), (
                    seed,
                    limits,
                )
                assert not scheduler.prefixes and sorted(scheduler.slots) == list(range(len(scheduler.slots))), (
                    seed,
                    limits,
                )
            preemptions += engine.stats.preemptions
    assert preemptions > 10
