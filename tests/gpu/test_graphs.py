"""Decode steps as CUDA graphs against the same steps launched one by one."""

import pytest
import torch

from tests.gpu.conftest import CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")]

COUNT, NEW = 150, 10
"""Prompts, which run at once, and most new tokens: graphs of 192 rows down to 32 or fewer."""


def without_graphs(*given):
    """An engine that launches each step's kernels one by one."""
    from training.generation.engine import Engine

    class Plain(Engine):
        def _prepare(self, requests):
            pages = super()._prepare(requests)
            self.graphs = None
            return pages

    return Plain(*given)


@pytest.fixture(scope="module", params=["bloom", "llama"])
def decoder(request, tmp_path_factory):
    from tests.support import generation_models
    from tests.support.bloom import tiny_bloom
    from tests.support.llama import tiny_llama
    from training.generation import triton_ops

    folder = tmp_path_factory.mktemp(request.param)
    make = {"bloom": tiny_bloom, "llama": tiny_llama}[request.param]
    model = make(folder, heads=8, hidden=256, vocab=1000, tied=False).cuda()
    return generation_models.decoder(folder, model, triton_ops, device="cuda")


def asked():
    """Responses of 1 to NEW tokens: rows leave at every step, and padded sizes with them."""
    from tests.support.generation_models import prompts
    from training.generation.request import Request, Sampling, draws

    uniforms = draws(1, 0, COUNT, NEW)
    return [
        Request(prompt, Sampling(1 + number % NEW, 1.0 if number % 3 else 0.0), uniforms[number])
        for number, prompt in enumerate(prompts(COUNT, 1000, 40))
    ]


def test_graphs_give_what_single_launches_give(decoder):
    from training.generation.cuda_graphs import padded_rows
    from training.generation.engine import Engine, EngineLimits

    graphs, plain = (make(decoder, EngineLimits(64, rows=COUNT), -1) for make in (Engine, without_graphs))
    expected = plain.generate(asked())
    for _ in range(2):  # the second call captures again, over the same cache
        replies = graphs.generate(asked())
        assert [reply.tokens for reply in replies] == [reply.tokens for reply in expected]
        for reply, other in zip(replies, expected, strict=True):
            assert torch.allclose(torch.tensor(reply.logprobs), torch.tensor(other.logprobs), atol=1e-4)
    sizes = set(graphs.graphs.captured)
    assert plain.graphs is None and len(sizes) > 3 and sizes == {padded_rows(size) for size in sizes}
    assert max(sizes) == padded_rows(COUNT)
