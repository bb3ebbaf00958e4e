"""Losses against their definitions, and the same losses and gradients whether one process has the batch or two."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.losses.contrastive import (
    clip_loss,
    compare,
    contrastive_loss,
    image_ids,
    itc_loss,
    itg_loss,
    itm_loss,
    softmax_loss,
)
from mmtransformer.losses.distributed import all_gather_rows
from mmtransformer.losses.hard_negatives import hard_negatives, hard_pairs, pair_noise
from mmtransformer.losses.sigmoid import siglip_loss, sigmoid_loss


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def itc_by_hand(
    images: Tensor, texts: Tensor, image_ids: list[int], text_ids: list[int], temperature: float, ls: float
) -> float:
    """The definition, one pair at a time."""

    def one_way(scores: list[list[float]], ids: list[int], others: list[int]) -> float:
        total = 0.0
        for row, mine in zip(scores, ids, strict=True):
            log_z = math.log(sum(math.exp(s / temperature) for s in row))
            right = [j for j, other in enumerate(others) if other == mine]
            for j, s in enumerate(row):
                loss_mask = (1 - ls) * (j in right) / len(right) + ls / len(row)
                total -= loss_mask * (s / temperature - log_z)
        return total / len(ids)

    near = [[max(float(v @ text) for v in image) for text in texts] for image in images]
    far = [list(column) for column in zip(*near, strict=True)]
    return (one_way(near, image_ids, text_ids) + one_way(far, text_ids, image_ids)) / 2


# ------------------------------------------------------------------------------------------------ contrastive


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itc_is_its_definition(smoothing: float) -> None:
    images, texts = unit(5, 3, 7), unit(11, 7)
    image_ids, text_ids = [4, 9, 4, 2, 0], [4, 9, 2, 0, 4, 9, 2, 9, 0, 4, 2]  # picture 4 stands there twice
    loss = itc_loss(
        images,
        texts,
        0.13,
        image_ids=torch.tensor(image_ids),
        text_ids=torch.tensor(text_ids),
        label_smoothing=smoothing,
    )
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(itc_by_hand(images, texts, image_ids, text_ids, 0.13, smoothing), abs=1e-13)


def test_texts_stand_beside_their_image_unless_ids_say_otherwise() -> None:
    images, texts = unit(3, 2, 5), unit(6, 5)
    plain = itc_loss(images, texts, 0.2)
    named = itc_loss(images, texts, 0.2, image_ids=torch.tensor([7, 1, 5]), text_ids=torch.tensor([7, 7, 1, 1, 5, 5]))
    assert torch.equal(plain, named)
    assert float(plain) == pytest.approx(itc_by_hand(images, texts, [0, 1, 2], [0, 0, 1, 1, 2, 2], 0.2, 0.0))


def test_clip_loss_is_the_mean_of_two_cross_entropies() -> None:
    images, texts, scale = unit(7, 5), unit(7, 5), torch.tensor(143.0, dtype=torch.float64)
    logits = scale * images @ texts.T  # as it stands, and whatever it is: logarithm and limit are the model's
    rows = torch.arange(7)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    assert float(clip_loss(images, texts, scale)) == pytest.approx(float(expected))
    assert float(clip_loss(images, texts, 143.0)) == pytest.approx(float(itc_loss(images, texts, 1 / 143)))


def test_siglip_loss_judges_each_pair_by_itself() -> None:
    images, texts = unit(3, 5), unit(6, 5)
    expected = 0.0
    for i in range(3):
        for j in range(6):
            z = 4.0 * float(images[i] @ texts[j]) - 1.5
            expected += math.log1p(math.exp(-z if j // 2 == i else z)) / 6
    assert float(siglip_loss(images, texts, 4.0, -1.5)) == pytest.approx(expected)
    twice = torch.tensor([5, 8, 5])
    both = siglip_loss(images, texts, 4.0, -1.5, image_ids=twice)
    assert float(both) == pytest.approx(float(sigmoid_loss(compare(images, texts, twice), 4.0, -1.5)))
    assert abs(float(both) - expected) > 0.1


def test_one_pair_is_a_batch() -> None:
    images, texts = unit(1, 3, 7).requires_grad_(), unit(1, 7).requires_grad_()
    loss = itc_loss(images, texts, torch.tensor(0.07), label_smoothing=0.1)
    loss.backward()
    assert loss.shape == ()
    assert float(loss.detach()) == 0.0
    assert images.grad is not None
    assert float(images.grad.abs().sum()) == 0.0


def test_fillers_take_no_part() -> None:
    images, texts = unit(4, 2, 5), unit(8, 5)
    ids = torch.tensor([3, -1, 8, -1])
    kept = torch.tensor([0, 2])
    alone = itc_loss(images[kept], texts[torch.tensor([0, 1, 4, 5])], 0.1, label_smoothing=0.1)
    beside = itc_loss(images, texts, 0.1, image_ids=ids, label_smoothing=0.1)
    assert float(beside) == pytest.approx(float(alone))


def test_one_text_of_two_images_belongs_to_both_but_not_to_fillers() -> None:
    images, texts = unit(4, 5), unit(4, 5)
    ids, keys = torch.tensor([3, 8, -1, 5]), torch.tensor([11, 11, 11, 12])
    found = compare(images, texts, ids, text_keys=keys)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(found.texts_of_images(), expected)
    assert torch.equal(found.images_of_texts(), expected)
    kept = torch.tensor([0, 1, 3])
    alone = softmax_loss(compare(images[kept], texts[kept], ids[kept], text_keys=keys[kept]), 3.0, hardness=0.5)
    assert float(softmax_loss(found, 3.0, hardness=0.5)) == pytest.approx(float(alone))
    scale, bias = torch.tensor(3.0), torch.tensor(-1.0)
    alone = sigmoid_loss(compare(images[kept], texts[kept], ids[kept], text_keys=keys[kept]), scale, bias)
    assert float(sigmoid_loss(found, scale, bias)) == pytest.approx(float(alone))


def test_similarities_are_not_rounded_by_autocast() -> None:
    images, texts = unit(3, 2, 64).float(), unit(3, 64).float()
    plain = compare(images, texts).of_images
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compare(images, texts).of_images, plain)


@pytest.mark.parametrize(
    ("images", "texts", "ids", "message"),
    [
        ((3, 2, 5), (3, 7), None, r"of one width, not \(3, 2, 5\) and \(3, 7\)"),
        ((3, 2, 5), (7, 5), None, "7 texts cannot be shared out among 3 images"),
        ((3, 2, 5), (3, 5), [1, 2], r"ids are \(3\) and \(3\), not \(2,\)"),
    ],
)
def test_what_cannot_be_compared(
    images: tuple[int, ...], texts: tuple[int, ...], ids: list[int] | None, message: str
) -> None:
    given = None if ids is None else torch.tensor(ids)
    with pytest.raises(ValueError, match=message):
        compare(unit(*images), unit(*texts), given, None if given is None else torch.arange(texts[0]))


# --------------------------------------------------------------------------------------------------- matching


def test_negatives_come_as_often_as_softmax_says() -> None:
    scores = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]]).expand(40_000, -1)
    allowed = torch.tensor([[True, True, False, True, True]]).expand_as(scores)
    noise = pair_noise(5, torch.arange(40_000), torch.arange(5))
    columns, found = hard_negatives(scores, allowed, noise)
    shares = columns.bincount(minlength=5) / 40_000
    expected = scores[0].masked_fill(~allowed[0], -torch.inf).softmax(0)
    assert float(shares[2]) == 0.0
    assert torch.allclose(shares, expected, atol=0.01)  # three standard deviations are 0.0075
    assert found.all()


def test_noise_is_uniform_and_depends_on_nothing_but_seed_and_keys() -> None:
    rows, columns = torch.arange(300) * 7919 - 5, torch.randint(-(2**62), 2**62, (300,))
    noise = pair_noise(1, rows, columns)
    assert 0 < float(noise.min()) < 1e-3
    assert 1 - 1e-3 < float(noise.max()) < 1
    counts = torch.histc(noise, 10, 0, 1) / noise.numel()
    assert torch.allclose(counts, torch.full((10,), 0.1), atol=0.005)
    assert abs(float(torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1])) < 0.02
    assert torch.equal(pair_noise(1, rows[7:9], columns[3:8]), noise[7:9, 3:8])
    assert not torch.equal(pair_noise(2, rows, columns), noise)


def test_hard_pairs_are_neither_ones_own_nor_fillers() -> None:
    """However alike those are: every row has two others to be told from, and takes each of them some time."""
    ids = torch.tensor([3, -1, 8, 5])
    found = compare(unit(1, 5).expand(4, -1), unit(1, 5).expand(8, -1), ids)
    seen: dict[int, set[int]] = {}
    for seed in range(20):
        pairs = hard_pairs(found, torch.tensor(0.1), texts=2, seed=seed)
        assert pairs.rows.tolist() == list(range(8))
        assert pairs.real.tolist() == [True, True, False, False, True, True, True, True]
        for row, image, text in zip(pairs.rows[pairs.real], pairs.images[pairs.real], pairs.texts[pairs.real]):
            own, others = int(found.text_ids[row]), {int(ids[image]), int(found.text_ids[text])}
            assert not others & {own, -1}
            seen.setdefault(own, set()).update(others)
    assert seen == {3: {5, 8}, 8: {3, 5}, 5: {3, 8}}


def test_an_image_without_a_target_has_no_number() -> None:
    loss_mask = torch.tensor([[0, 1], [0, 0], [0, 0], [0, 0]]).bool()
    found = image_ids(["그림", "b"], loss_mask)
    assert found is not None
    assert (int(found[0]) > 0, int(found[1])) == (True, -1)
    assert found[0] == image_ids(["그림"], loss_mask[:2])  # whatever stands beside it


def test_without_another_image_there_is_no_negative() -> None:
    same = torch.tensor([[False, False], [True, False]])
    columns, found = hard_negatives(torch.zeros(2, 2), same, torch.full((2, 2), 0.5))
    assert found.tolist() == [False, True]
    assert int(columns[1]) == 0


def test_matching_waits_for_no_device() -> None:
    """On the meta device nothing has a value: a loop over rows or .item() would fail."""
    scores, same = torch.empty(7, 5, device="meta"), torch.empty(7, 5, dtype=torch.bool, device="meta")
    keys = torch.empty(7, dtype=torch.long, device="meta")
    chosen, found = hard_negatives(scores, ~same, pair_noise(3, keys, keys[:5]))
    assert chosen.shape == found.shape == (7,)
    logits = torch.empty(7, 2, device="meta", requires_grad=True)
    loss = itm_loss(logits, found, found)
    loss.backward()
    assert loss.device.type == "meta"


def test_itm_is_cross_entropy_of_what_counts() -> None:
    logits, match = torch.randn(7, 2, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 0, 1, 1]).bool()
    is_real = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    expected = F.cross_entropy(logits[is_real], match[is_real].long())
    assert float(itm_loss(logits, match, is_real)) == pytest.approx(float(expected))
    assert float(itm_loss(logits, match)) == pytest.approx(float(F.cross_entropy(logits, match.long())))
    assert float(itm_loss(logits, match, torch.zeros_like(match))) == 0.0


# ------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itg_predicts_the_next_token(smoothing: float) -> None:
    hidden, tokens = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(0, 11, (3, 7))
    loss_mask = torch.rand(3, 7) < 0.6
    head = nn.Linear(5, 11).double().requires_grad_(False)
    total, count = 0.0, 0
    for i in range(3):
        for j in range(1, 7):
            if loss_mask[i, j]:
                logits, label = head(hidden[i, j - 1]), tokens[i, j]
                total += float(F.cross_entropy(logits[None], label[None], label_smoothing=smoothing))
                count += 1
    loss = itg_loss(hidden, tokens, loss_mask, head, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(total / count)
    shorter = itg_loss(hidden[:, :-1], tokens, loss_mask, head, label_smoothing=smoothing)
    assert torch.equal(loss, shorter)


def test_itg_without_a_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the 2 texts has a target token"):
        itg_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.zeros(2, 3).bool(), nn.Identity())


# ---------------------------------------------------------------------------------------------- two processes

B, R, L, E = 5, 2, 3, 7


class Model(nn.Module):
    """A linear tower for each side and a temperature: enough for every way that gradients take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.image, self.text = nn.Linear(6, L * E), nn.Linear(6, E)
        self.head, self.words = nn.Linear(E, 2), nn.Linear(E, 13)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.double()

    def embed(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        vectors = F.normalize(self.image(images).unflatten(1, (L, E)), dim=-1)
        return vectors, F.normalize(self.text(texts), dim=-1)

    def losses(self, images: Tensor, texts: Tensor, ids: Tensor, gather_grad: bool) -> list[Tensor]:
        (vectors, text), words = self.embed(images, texts), self.text(texts)
        s = compare(vectors, text, ids, gather_grad=gather_grad)
        temperature = self.log_temperature.exp()
        itc = contrastive_loss(s, temperature, label_smoothing=0.1)
        keys = s.text_ids * 100 + torch.arange(len(texts)) % R
        allowed = (s.text_ids[:, None] != s.all_image_ids) & (s.all_image_ids >= 0)
        chosen, found = hard_negatives(s.of_texts / temperature, allowed, pair_noise(3, keys, s.all_image_ids))
        other = all_gather_rows(vectors)[chosen].mean(1) * text
        itm = itm_loss(self.head(other), torch.zeros_like(found), found & (s.text_ids >= 0))
        tokens = (texts.abs() * 10).long() % 13
        loss_mask = (torch.arange(6) > 0) & (s.text_ids >= 0)[:, None] & (tokens % 3 > 0)
        itg = itg_loss(words[:, None].expand(-1, 6, -1), tokens, loss_mask, self.words, label_smoothing=0.1)
        return [itc, itm, itg]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(12)
    ids = torch.tensor([41, 7, 41, 3, 90])  # one picture stands there twice
    return torch.randn(B, 6, dtype=torch.float64), torch.randn(B * R, 6, dtype=torch.float64), ids


def run(rank: int, world: int, folder: str) -> None:
    """One process: its share of the batch (uneven, with a filler), losses and gradients into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        images, texts, ids = batch()
        mine = torch.arange(B)[rank::world]
        if rank:  # a filler, as the sampler deals them out
            mine = torch.cat((mine, mine[:1]))
        rows = (mine[:, None] * R + torch.arange(R)).flatten()
        given = ids[mine].clone()
        if rank:
            given[-1] = -1
        part = torch.arange(B).split(3)[rank]  # in one piece, so that no ids are needed
        vectors, words = Model().embed(images[part], texts.unflatten(0, (B, R))[part].flatten(0, 1))
        out: dict[object, object] = {"plain": clip_loss(vectors.mean(1), words, 2.5).detach()}
        for grad in (True, False):
            model = Model()
            found = model.losses(images[mine], texts[rows], given, grad)
            sum(found).backward()  # type: ignore[union-attr]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            for g in grads:  # what DDP does
                dist.all_reduce(g)
            out[grad] = ([loss.detach() for loss in found], [g / world for g in grads])
        torch.save(out, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=run, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model = Model()
    images, texts, ids = batch()
    vectors, words = model.embed(images, texts)
    plain = float(clip_loss(vectors.mean(1), words, 2.5).detach())
    assert sum(float(part["plain"]) for part in parts) / 2 == pytest.approx(plain, abs=1e-14)
    losses = model.losses(images, texts, ids, gather_grad=True)
    sum(losses).backward()  # type: ignore[union-attr]
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    for grad in (True, False):
        both = [sum(x) / 2 for x in zip(*(part[grad][0] for part in parts), strict=True)]
        assert max(abs(float((a - b).detach())) for a, b in zip(both, losses, strict=True)) < 1e-14  # type: ignore[operator]
    exact = max(float((a - b).abs().max()) for a, b in zip(parts[0][True][1], grads, strict=True))
    assert exact < 1e-14
    cut = max(float((a - b).abs().max()) for a, b in zip(parts[0][False][1], grads, strict=True))
    assert cut > 1e-4  # without the gradients of others it is another one, as the docstring says


def test_gather_in_one_process_is_nothing() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert all_gather_rows(x) is x
    assert all_gather_rows(x, grad=False) is x
