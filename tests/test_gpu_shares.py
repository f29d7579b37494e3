"""What a piece asks of a card is Ray's to give: no more pieces at a time than fit onto the cards there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lightning_acc.core import devices
from lightning_acc.errors import RequestError
from lightning_acc.progress import Progress
from lightning_acc.scoring import cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def span(job: None, piece: int, progress: Callable[[float], None]) -> tuple[float, float]:
    """When a piece was worked on."""
    started = time.time()
    time.sleep(0.5)
    return started, time.time()


def at_once(spans: list[tuple[float, float]]) -> int:
    """How many were worked on at the same time, at most."""
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def test_pieces_share_a_card_as_far_as_it_goes(no_ray: None) -> None:
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=40)
    for gpu, most in ((1.0, 1), (0.4, 2)):
        with Progress("pieces", 4, False, 4, "pieces") as bar:
            done = list(cluster.each(span, None, range(4), "local", bar, gpu=gpu))
        assert sorted(piece for piece, _ in done) == [0, 1, 2, 3]
        assert at_once([times for _, times in done]) <= most


def test_a_cluster_without_a_gpu_says_so(no_ray: None) -> None:
    import ray

    ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=40)
    with (
        Progress("pieces", 1, False, 1, "pieces") as bar,
        pytest.raises(RequestError, match="The Ray cluster at 'local' has no GPU: add a node with one, or give device='cpu'"),
    ):
        list(cluster.each(span, None, [0], "local", bar, gpu=0.5))


def test_the_share_of_a_card_is_that_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.share(torch.device("cpu"), 2**40) == 0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * 2**30))
    cuda = torch.device("cuda:1")
    budgets = (0, 2**30, 2 * 2**30, 2**40)
    assert [devices.share(cuda, memory) for memory in budgets] == [0.05, 0.15, 0.25, 1.0]
    assert devices.of_worker(cuda) == torch.device("cuda")
