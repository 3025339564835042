"""Run on three ranks: collectives, contrastive loss and batch norm against one process that holds all rows, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pspg.engine.data.batch import Batch
from pspg.engine.distributed.batch_norm import convert_sync_batch_norm
from pspg.engine.distributed.collectives import (
    all_gather_host,
    all_gather_rows,
    all_reduce_mean,
    average_gradient,
    first_refusal,
    local_slice,
    start_mean,
)
from pspg.engine.models import class_set
from pspg.engine.models.clip import ImageFeatures, build_clip
from pspg.engine.training.feature_cache import cache_features
from pspg.engine.training.losses import contrastive_loss
from pspg.engine.training.losses.contrastive import MAX_LOGIT_SCALE

Counts = list[int]
VISION = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def leaves(*tensors: Tensor, rows: slice) -> list[Tensor]:
    return [(tensor[rows] if tensor.ndim else tensor).clone().requires_grad_() for tensor in tensors]


def compare(function: Callable[..., Tensor], part: Callable[..., Tensor], *tensors: Tensor, counts: Counts) -> None:
    """Sum of the ranks' parts and its gradients against `function` of all rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    whole, own = leaves(*tensors, rows=slice(None)), leaves(*tensors, rows=rows)
    loss, mine = function(*whole), size * part(*own)
    expected = torch.autograd.grad(loss, whole)
    got = torch.autograd.grad(mine, own)
    total = mine.detach().clone()
    dist.all_reduce(total)
    close(total / size, loss.detach())
    for one, other in zip(got, expected, strict=True):
        if one.ndim:
            close(one / size, other[rows])
        else:
            mean = one.clone()
            dist.all_reduce(mean)
            close(mean / size, other)


def check_gathering(counts: Counts) -> None:
    rows, weights = torch.randn(sum(counts), 4, dtype=torch.float64), torch.randn(sum(counts), 4, dtype=torch.float64)
    first, last = local_slice(sum(counts))

    def part(own: Tensor) -> Tensor:
        # Each rank uses other rows of what all gathered: gradients come from elsewhere.
        return (all_gather_rows(own, counts) ** 3 * weights)[first:last].sum()

    compare(lambda rows: (rows**3 * weights).sum(), part, rows, counts=counts)


def check_contrastive(counts: Counts, scale: float) -> None:
    """The first rank's texts are swapped, the last one's match: their parts pull the temperature both ways."""
    images = 1 + 0.1 * torch.randn(sum(counts), 5, dtype=torch.float64)
    texts = torch.cat([images[: counts[0]].flip(0), images[counts[0] :]])
    tensors = images, texts, torch.tensor(scale, dtype=torch.float64)
    compare(contrastive_loss, lambda *own: contrastive_loss(*own, counts), *tensors, counts=counts)


def check_batch_norm(counts: Counts) -> None:
    x, weights = torch.randn(2, sum(counts), 3, 4, 4, dtype=torch.float64) * 3 + 1
    plain, shared = (nn.Sequential(nn.BatchNorm2d(3)).double() for _ in range(2))
    convert_sync_batch_norm(shared, torch.device("cpu"))
    rank = dist.get_rank()
    own = weights[sum(counts[:rank]) : sum(counts[: rank + 1])]
    compare(lambda x: (plain(x) * weights).sum(), lambda x: (shared(x) * own).sum(), x, counts=counts)
    for name, buffer in plain.named_buffers():
        close(shared.get_buffer(name), buffer)
    assert shared.state_dict().keys() == plain.state_dict().keys()
    close(shared.eval()(x), plain.eval()(x))


def check_feature_cache() -> None:
    """Each rank encodes its own batches only; all have all of them in order, though one rank could read nothing."""
    rank, encoded = dist.get_rank(), []
    shares = {0: [0, 3], 1: [2], 2: []}

    def batch(place: int) -> Batch:
        rows, count = torch.arange(place, place + 2), 1 if place == 3 else 2
        pixels, ids = torch.full((count, 1, 1), place, dtype=torch.uint8), [f"{place}{row}" for row in range(count)]
        return Batch(ids, rows[:count], pixels, torch.full((count, 2), float(place)), None, 0.0, 1.0)

    class Loader(list[Batch]):
        bad = {"lost": "is empty"} if rank == 2 else {}

    class Tower:
        def image_features(self, images: Tensor) -> ImageFeatures:
            encoded.append(len(images))
            mean = images[:, :, 0, 0]
            return ImageFeatures(mean, mean[:, None])

    found = cache_features(Tower(), Loader(map(batch, shares[rank])), torch.device("cpu"), None, title="")
    assert len(encoded) == len(shares[rank])
    assert found.ids == ["00", "01", "20", "21", "30"]
    assert found.labels.tolist() == [[place, place] for place in (0, 0, 2, 2, 3)]
    assert (found.features.global_[:, 0] * 255).round().tolist() == [0, 0, 2, 2, 3]
    assert found.features.tokens.shape == (5, 1, 3)
    assert found.bad == {"lost": "is empty"}


def check_class_features() -> None:
    """Chunks of one name on one rank each, to the bits of one process; each name is encoded by one rank."""
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    torch.manual_seed(0)
    clip, names = build_clip(config).eval(), ["edema", "mass", "effusion", "nodule"]
    class_set.CHUNK = 1
    encoded, encode = [], class_set.encode

    def counted(*arguments: Any) -> Tensor:
        encoded.append(1)
        return encode(*arguments)

    class_set.encode = counted
    found = class_set.make_class_set(clip, names, shared=True).class_features
    assert len(encoded) == len(range(dist.get_rank(), 4, 3))
    assert torch.equal(found, class_set.make_class_set(clip, names).class_features)


def check_means() -> None:
    """In buckets, without a gradient that no rank has; and one that runs beside other work."""
    rank = dist.get_rank()
    tensors = [torch.full((2, 3), float(rank)), None, torch.full((1,), 3.0 * rank)]
    one, none, other = all_reduce_mean(tensors)
    assert none is None
    assert torch.equal(one, torch.ones(2, 3))
    assert torch.equal(other, torch.full((1,), 3.0))
    finish = start_mean(tensors[0])
    assert torch.equal(finish(), torch.ones(2, 3))
    assert first_refusal(None) is None
    assert first_refusal("why") == "why"
    assert first_refusal("why" if rank else None) == "rank 1: why"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    assert [int(value) for value in all_gather_host(torch.tensor([dist.get_rank()]))] == [0, 1, 2]
    value = torch.ones((), dtype=torch.float64, requires_grad=True)
    (average_gradient(value) * dist.get_rank()).backward()
    assert value.grad == 1.0
    check_feature_cache()
    check_class_features()
    check_means()
    for counts in ([2, 2, 2], [3, 0, 2]):
        check_gathering(counts)
        check_contrastive(counts, 1.0)
        check_contrastive(counts, MAX_LOGIT_SCALE + 0.1)
        check_batch_norm(counts)
    dist.barrier()
    dist.destroy_process_group()
