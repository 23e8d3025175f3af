"""The sparse forward of a GPU in the strict interpreter: rows made to break it, a frozen head.

The head is the identity, so that dhidden of a row is `a (1[v = y] - p)` itself: what was kept, what
was given back as an average, and the certificate can be read off it.
"""

import pytest
import torch

from orpo_kernels.engine import host_copy, scoring
from orpo_kernels.engine.sparse import plan, scan_loop
from orpo_kernels.kernels import live_columns, pack_slots, scan, scan_state, tail_rows, tuning
from orpo_kernels.kernels.slot_store import ScanShape
from orpo_kernels.linear_logps import certified_logps, linear_logps
from orpo_kernels.options import LogpsOptions
from tests.kernels.interpreted.engine import as_on_a_gpu, short_steps
from tests.kernels.interpreted.plugin import launches

# V = 261: no vector divides it; two blocks of 64 rows, the second one ragged. A block of 104
# columns is two spans of 64, a span one tile; two spans are a wide one.
V, N, EPS = 261, 70, 2.0**-7
WHOLE, BLOCKS = ScanShape(128, V, 1024, V, 4), ScanShape(64, 104, 1024, V, 4)
KEPT = 2.0**-8 / (1 - 2.0**-8)  # rounding of a slot, of what it is


@pytest.fixture
def gpu(monkeypatch):
    """Sets the shape of the forward; no call is left to the exact loop."""
    monkeypatch.setattr(scan_loop, "MOST_DENSE", 1.0)
    as_on_a_gpu(monkeypatch, widens=True)
    monkeypatch.setattr(scan_state, "MOST_SPAN", 128)
    # Of row blocks and spans few at once, so that there are several steps of each.
    for module in (scan, live_columns):
        monkeypatch.setattr(module, "SPANS", 2)
    monkeypatch.setattr(live_columns, "_COUNTED", (1, 2))
    monkeypatch.setattr(pack_slots, "_COUNTED", 2)
    monkeypatch.setattr(pack_slots, "_ADDED", 1)
    monkeypatch.setattr(tail_rows, "_SPANS", 1)
    for kernel in ("scan", "scan_softcap"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            monkeypatch.setitem(
                tuning.TABLE, (kernel, "datacenter", dtype), (tuning.Row(1, 2, 64),)
            )

    def shaped(shape):
        monkeypatch.setattr(plan, "plan_scan", lambda *_: (shape, 0))

    return shaped


def run(logits, labels, groups=None, **options):
    """Log-probs, certificate, and `-dhidden` but for the labels: the kept entries and the tail."""
    hidden = logits.clone().requires_grad_()
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    given = LogpsOptions(gradient="sparse", eps=EPS, tail_groups=groups, **options)
    logps, certificate = certified_logps(hidden, weight, labels, None, given)
    (dhidden,) = torch.autograd.grad(logps.sum(), hidden)
    one_hot = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    return logps.detach().double(), certificate, (one_hot - dhidden.float()).double()


def entries(logits, labels):
    """Softmax in float64, and what of it is no label's."""
    p = torch.softmax(logits.double(), 1)
    return p, p.scatter(1, labels[:, None], 0.0)


KINDS = ("text", "late", "low", "flat", "spike", "rising", "masked")


def adversary(seed):
    """Logits of which every row is of one kind, labels, groups."""
    torch.manual_seed(seed)
    # A quarter of the columns is popular: the others are live in few row blocks.
    logits = torch.randn(N, V) * 2 + torch.where(torch.rand(V) < 0.25, 4.0, -6.0)
    labels = torch.randint(0, V, (N,))
    for row in range(N):
        kind = KINDS[int(torch.randint(len(KINDS), ()))] if seed % 3 else KINDS[seed // 3 % 7]
        if kind == "late":  # all mass in the last block, a hundred nats over the others
            logits[row, 210:] += 100.0
        elif kind == "low":  # the label and the first block say nothing: the estimate is -150
            logits[row, :104] -= 150.0
            labels[row] = int(torch.randint(0, 104, ()))
        elif kind == "flat":
            logits[row] = 1.0
        elif kind == "spike":
            logits[row, int(torch.randint(V, ()))] = 60.0
        elif kind == "rising":
            logits[row] = torch.linspace(-90, 90, V)
        elif kind == "masked":
            logits[row, 20:230] = -3e4
            labels[row] = int(torch.randint(0, 20, ()))
    return logits, labels, torch.randint(0, 2, (N,))


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("seed", range(25))
def test_adversarial_tiles(gpu, shape, seed, monkeypatch):
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    logits, labels, groups = adversary(seed)
    gpu(shape._replace(slots=(1024, 260, 40)[seed % 3]))  # room for all, for most, for few
    for module in (scan, live_columns):  # spans are added in one step, or in as many as there are
        monkeypatch.setattr(module, "SPANS", 1 if seed % 2 else 16)
    logps, certificate, found = run(logits, labels, groups)
    _, u = entries(logits, labels)
    expected = torch.log_softmax(logits.double(), 1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-4)
    assert torch.isfinite(found).all()
    of_rest = found.scatter(1, labels[:, None], 0.0)
    # A superset: what is over eps is there as it is, but for its rounding and an average's part.
    # The label has its part of the average too, so rows are not quite those of the definition.
    mass = float(certificate.tail_mass_max) + 1e-3
    over = u > EPS * (1 + 1e-4)
    assert ((of_rest - u).abs() <= KEPT * u + mass)[over].all()
    # The mass of a row is conserved, but for the rounding of dense ones.
    torch.testing.assert_close(found.sum(1), torch.ones(N).double(), rtol=0, atol=2.0**-8)
    # No block of 64 rows gives more than a fifth back as an average.
    assert certificate.tail_mass <= live_columns.MOST_LOST + 1e-3
    # Dropped entries are no larger than promised.
    assert (of_rest - u).norm(dim=1).max() <= float(certificate.residual_rms_max) + mass + 5e-3


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_rounding_of_heavy_columns_is_kept_too(gpu, shape):
    # All of the mass is in six columns, one of a label; two of the others have little of it.
    torch.manual_seed(5)
    logits, labels = torch.full((N, V), -20.0), torch.full((N,), 40)
    logits[:, [7, 40, 150, 259]] = torch.randn(N, 4)
    logits[[3, 68], [90, 200]] = -2.0
    gpu(shape)
    _, certificate, found = run(logits, labels)
    assert certificate.kept_share < 0.05
    _, u = entries(logits, labels)
    error = (found - u).abs() / u
    assert error[:, [7, 150, 259]].max() < 2.0**-15
    light = torch.stack((error[3, 90], error[68, 200]))
    assert (light > 2.0**-14).all()
    assert (light < 2.0**-8).all()


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_mass_is_conserved_where_nothing_is_dense(gpu, shape, monkeypatch):
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
    logits, labels, groups = adversary(0)
    gpu(shape)
    _, certificate, found = run(logits, labels, groups)
    assert 0.1 < certificate.kept_share < 0.9
    torch.testing.assert_close(found.sum(1), torch.ones(N).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("last", [64, 40])  # of the first group: whole row blocks, or a mixed one
def test_a_group_gives_back_its_own(gpu, last, monkeypatch):
    monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    torch.manual_seed(0)
    # Most entries are under eps, those of either group in columns of its own.
    logits, labels = torch.randn(N, V) * 0.2, torch.zeros(N, dtype=torch.int64)
    logits[:last, : V // 2] += 1.0
    logits[last:, V // 2 :] += 1.0
    _, u = entries(logits, labels)
    gpu(WHOLE)
    for groups in ((torch.arange(N) >= last).long(), (torch.arange(N) < last).long()):
        _, certificate, found = run(logits, labels, groups)
        assert certificate.tail_mass > 0.2
        off = found.scatter(1, labels[:, None], 0.0) - u
        # Of a group's rows the errors sum to 0: of one block, whose estimates are good.
        for group in (0, 1):
            rows = off[groups == group]
            assert rows.sum(0).abs().max() < 0.1 * rows.abs().sum(0).max()


def test_a_group_that_drops_next_to_nothing_has_a_tail_of_its_own(gpu, monkeypatch):
    # Every other row has two columns of its own; of all else it has 1e-11, its neighbours 0.004.
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
    torch.manual_seed(0)
    logits, labels, groups = torch.randn(N, V) * 0.1, torch.zeros(N).long(), torch.arange(N) % 2
    even = torch.arange(0, N, 2)
    logits[::2] -= 25.0
    logits[even, even + 10] = logits[even, even + 11] = -4.0
    logits[::2, 0] = 0.0
    gpu(WHOLE)
    _, certificate, found = run(logits, labels, groups)
    assert certificate.tail_mass > 0.2
    # What their kept entries were rounded by goes where they drop, in one proportion.
    given = found[::2, 90:].abs()
    shares = given / given.sum(1, keepdim=True)
    _, u = entries(logits, labels)
    expected = u[::2, 90:].sum(0) / u[::2, 90:].sum()
    assert (shares / expected - 1).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("softcap", [30.0, 60.0, 300.0])
def test_estimates_that_are_far_too_low_under_a_softcap(gpu, shape, softcap, monkeypatch):
    # The labels and the first block say -softcap, others softcap: 87, 173 and 866 powers of two. Of
    # some rows slopes are 0 where exponentials are infinite.
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    torch.manual_seed(4)
    logits = torch.randn(N, V) * 0.2 * softcap
    logits[:, :104] -= 3 * softcap
    logits[:40, 200:] += 3 * softcap
    logits[::3, 210] = 200 * softcap
    labels = torch.randint(0, 104, (N,))
    gpu(shape)
    logps, certificate, found = run(logits, labels, torch.arange(N) % 2, softcap=softcap)
    z = softcap * torch.tanh(logits.double() / softcap)
    expected = torch.log_softmax(z, 1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-5)
    u = z.softmax(1) / torch.cosh(logits.double() / softcap).square()
    over = (u > EPS * (1 + 1e-4)).scatter(1, labels[:, None], False)
    mass = float(certificate.tail_mass_max) + 1e-3
    assert ((found - u).abs() <= KEPT * u + mass)[over].all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_flat_rows_are_done_the_exact_way(gpu, shape):
    # Nothing is over eps, and all of it would be an average: a fifth may be, in blocks.
    logits = torch.randn(N, V) * 0.1
    labels = torch.randint(0, V, (N,))
    gpu(shape)
    _, certificate, found = run(logits, labels)
    p, _ = entries(logits, labels)
    assert certificate.tail_mass <= live_columns.MOST_LOST
    if shape is WHOLE:
        assert certificate.kept_share == 1
        assert certificate.tail_mass == 0
        found.scatter_(1, labels[:, None], 0.0)
        true = p.scatter(1, labels[:, None], 0.0)
        assert (found - true).norm() <= 2.0**-8 * true.norm()


@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_flat_calls_are_left_to_the_exact_loop(gpu, shape, monkeypatch):
    # One of the two row blocks is flat: over a quarter. While a graph is captured none is left.
    monkeypatch.setattr(scan_loop, "MOST_DENSE", 0.25)
    short_steps(monkeypatch)
    logits = torch.randn(N, V) * 0.1
    logits[64:, 3] = 20.0
    labels = torch.randint(0, V, (N,))
    gpu(shape._replace(rows=128))
    before = len(launches)
    logps, certificate, found = run(logits, labels)
    used = launches[before:]
    assert (used.count("scan"), used.count("gather_slots")) == (2, 0)
    assert {"softmax_block", "softmax_rows"} & set(used)
    assert (certificate.kept_share, certificate.tail_mass) == (1, 0)
    hidden = logits.clone().requires_grad_()
    exact = linear_logps(hidden, torch.eye(V), labels)
    (dhidden,) = torch.autograd.grad(exact.sum(), hidden)
    assert torch.equal(logps, exact.detach().double())
    one_hot = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    assert torch.equal(found, (one_hot - dhidden).double())
    monkeypatch.setattr(scan_loop, "is_capturing", lambda device: True)
    before = len(launches)
    run(logits, labels)
    assert "gather_slots" in launches[before:]


@pytest.mark.parametrize("room", ["slots", "listed"])
@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_what_has_no_room_goes_the_exact_way(gpu, shape, room, monkeypatch):
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    torch.manual_seed(2)
    logits, labels = torch.randn(N, V) * 2, torch.randint(0, V, (N,))
    gpu(shape._replace(**{room: 8}))
    _, certificate, found = run(logits, labels)
    p, _ = entries(logits, labels)
    assert certificate.kept_share > 0.99
    true = p.scatter(1, labels[:, None], 0.0)
    found.scatter_(1, labels[:, None], 0.0)
    assert (found - true).norm() <= 2.0**-8 * true.norm()
    assert abs(certificate.tail_mass) < 1e-6


def test_the_reference_moves_after_slots_and_after_a_dense_tile(gpu, monkeypatch):
    # Block 0 is dense for the first 64 rows, of which nearly all its columns are over eps, and has
    # one live column for the others. Block 2 is 16 nats over it: 2^-23 is left of both; what is not
    # brought to the new reference would be of size 1. Of every third row it stays.
    monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
    torch.manual_seed(3)
    logits = torch.full((N, V), -20.0)
    logits[:64, :104] = torch.randn(64, 104) / 8
    logits[64:, 3] = 4.0
    logits[:, 210] = 20.0
    logits[::3, 210] = 3.0
    labels = torch.full((N,), 150)
    gpu(BLOCKS._replace(rows=128))
    logps, _, found = run(logits, labels)
    p, u = entries(logits, labels)
    torch.testing.assert_close(logps, torch.log(p[:, 150]), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[64:, 3], u[64:, 3], rtol=2.0**-7, atol=0)
    torch.testing.assert_close(found[:64, :104], u[:64, :104], rtol=2.0**-7, atol=2e-5)


@pytest.mark.parametrize("live", [1, 4], ids=["slots", "dense tiles"])
def test_float16_has_room_for_entries_times_the_scale(gpu, live, monkeypatch):
    # What is 2^11 over the first block, whose reference would stay, times 64 is 2^17 of it.
    monkeypatch.setattr(live_columns, "MOST_LIVE", live)
    torch.manual_seed(6)
    logits = (torch.randn(N, V) / 8).half()
    logits[:, 150] = 17.5 * 0.693 / 64  # the first block has 2^6.7
    logits[:, :104] /= 64
    logits[:, 104:150] -= 1.0
    logits[:, 151:] -= 1.0
    labels = torch.full((N,), 200)
    gpu(BLOCKS)
    logps, _, found = run(logits, labels, logit_scale=64.0)
    z = 64 * logits.double()
    torch.testing.assert_close(logps, torch.log_softmax(z, 1)[:, 200], rtol=1e-5, atol=1e-5)
    true = 64 * z.softmax(1)
    # One is subtracted of the label, whose slope is 64.
    found[:, 200] += 63.0
    assert (found - true).norm() < 2.0**-7 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_same_bits_twice_and_what_is_launched(gpu, shape, dtype):
    logits, labels, groups = adversary(1)
    logits = logits.clamp(-60, 60).to(dtype)
    gpu(shape)
    before = len(launches)
    one = run(logits, labels, groups)
    counts = {name: launches[before:].count(name) for name in set(launches[before:])}
    again = run(logits, labels, groups)  # programs run in another order
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[2], again[2])
    chunks = 1 if shape is WHOLE else 2
    blocks = -(-V // shape.columns)
    assert counts["scan"] == chunks * (blocks + 1)
    for name in ("live_columns", "pack_slots", "dense_rows"):
        assert counts[name] == chunks * blocks
    for name in ("gather_slots", "finish_rows", "dropped_rows"):
        assert counts[name] == chunks


def test_rows_that_are_not_scored_under_capture_are_in_no_tail(gpu, monkeypatch):
    # Every row is processed then, those not scored as rows of 0: a flat softmax that is all tail.
    logits, labels, groups = adversary(1)
    labels[::3] = -100
    gpu(WHOLE)
    chosen = labels >= 0
    _, certificate, found = run(logits[chosen], labels[chosen], groups[chosen])
    for module in (host_copy, scoring):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    _, of_all, everything = run(logits, labels, groups)
    # The row blocks are others, and so is what is dropped: both are within the average's part.
    bound = max(float(certificate.tail_mass_max), float(of_all.tail_mass_max)) + 5e-3
    assert (everything[chosen] - found).abs().max() <= bound
    silent = everything[~chosen].scatter(1, labels[~chosen].clamp(min=0)[:, None], 0.0)
    assert not silent.any()
