"""Offloaded tensors: their values come back, their views stay valid, and the device's memory is
really freed."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.distributed import run
from tests.support.learners import fill, learner, settings, wrong
from training.optim.offload import Offloaded, host_memory


def test_views_see_what_their_storage_held_and_offloaded_it_holds_nothing():
    base = torch.arange(1000.0)
    view, other = base[10:20], torch.arange(7, dtype=torch.int16)
    group = Offloaded([base, view, other, torch.zeros(0)])
    assert len(group.storages) == 2 and [storage.nbytes() for storage in group.storages] == [0, 0]
    group.prefetch()
    group.wait()
    assert torch.equal(view, torch.arange(10.0, 20)) and torch.equal(other, torch.arange(7, dtype=torch.int16))
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def test_what_was_written_comes_back_if_it_was_said_to_have_changed():
    values = torch.zeros(5)
    group = Offloaded([values])
    for changed, expected in ((True, 1.0), (False, 1.0), (True, 2.0)):
        group.wait()
        values += 1
        group.changed = changed
        group.offload()
        group.wait()
        assert values.tolist() == [expected] * 5, (changed, expected)
        group.offload()


def test_one_goes_while_the_other_comes():
    first, second = torch.ones(6), torch.full((6,), 2.0)
    groups = [Offloaded([tensor]) for tensor in (first, second)]
    groups[0].wait()
    groups[0].offload(meanwhile=groups[1])
    assert first.untyped_storage().nbytes() == 0 and second.tolist() == [2.0] * 6
    groups[0].offload(meanwhile=groups[1])  # both are where they were
    groups[1].wait()
    assert second.tolist() == [2.0] * 6


def test_memory_that_can_t_be_pinned_is_named_as_the_host_s(monkeypatch):
    # 2: "out of memory"
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaError=SimpleNamespace(success=0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        MemoryError, match=r"^0\.1 GB of host memory can't be pinned \(CUDA says 2\): .* \(ulimit -l\), or set offload"
    ):
        host_memory(10**8)


@pytest.mark.parametrize(("optimizer_precision", "size"), [("bf16", 6), ("fp32", 12)])
def test_an_offloaded_learner_keeps_its_weights_and_nothing_else(optimizer_precision, size):
    """``size`` is the bytes per parameter of the optimizer while it is read. Gradients have memory
    only in steps."""

    def bytes_a_parameter():
        offloading = learner(settings("", optimizer_precision=optimizer_precision))
        fill(offloading, 3)
        offloading.offload()
        optimizer = offloading.optimizer
        count = sum(weight.numel() for weight in offloading.model.parameters())

        def bytes_in_use():
            tensors = (
                *optimizer.own_tensors(),
                *(buffer.grad_data for part in offloading.wrapped for buffer in part.buffers),
            )
            return sum({id(one): one.untyped_storage().nbytes() for one in tensors}.values()) / count

        offloaded = bytes_in_use()
        offloading.ready(changed=False)
        assert wrong(offloading, 3) == []
        on_device = bytes_in_use()
        offloading.sleep()
        return offloaded, on_device, bytes_in_use()

    ((offloaded, on_device, again),) = run(bytes_a_parameter, 1, 1, 1)
    assert offloaded == again == 0 and on_device == pytest.approx(size, rel=0.01)
