"""The whole loss on a device: against float64, same bits twice, in a graph, compiled, in budget."""

import pytest
import torch

from orpo_kernels import linear_logps, odds_ratio_loss, orpo_loss, reference
from orpo_kernels.loss import orpo_loss_from_logps
from orpo_kernels.pair_loss import pair_loss
from orpo_kernels.sequence_mean import sequence_mean
from tests.gpu.cases import pairwise
from tests.gpu.waits import waits
from tests.helpers import assert_accurate

pytestmark = pytest.mark.gpu

P, T, H, V = 3, 40, 256, 5003


def problem(device, dtype, *, bias=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * P, T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * H**-0.5 * 4
    labels = torch.randint(0, V, (2 * P, T), generator=generator)
    labels[:, :5] = -100
    labels[1, 20:] = -100
    nll_labels = torch.randint(0, V, (2 * P, T), generator=generator)
    nll_labels[P:] = -100
    tensors = [hidden, weight, torch.randn(V, generator=generator) if bias else None]
    tensors = [t if t is None else t.to(device, dtype).requires_grad_() for t in tensors]
    return (*tensors, labels.to(device), nll_labels.to(device))


def loss_and_gradients(hidden, weight, bias, labels, **options):
    out = orpo_loss(hidden, weight, labels, bias, **options)
    wanted = [each for each in (hidden, weight, bias) if each is not None]
    return out.loss, *torch.autograd.grad(out.loss, wanted)


@pytest.mark.parametrize(
    ("dtype", "softcap", "workspace"),  # by default E is kept, in 4 MiB it is recomputed
    pairwise([torch.float32, torch.bfloat16, torch.float16], [None, 8.0], [None, 4 * 2**20]),
    ids=str,
)
def test_against_float64(gpu, dtype, softcap, workspace):
    hidden, weight, bias, labels, nll = problem(gpu.device, dtype, bias=True)
    options = {"nll_labels": nll, "softcap": softcap, "beta": 0.3}
    found = loss_and_gradients(hidden, weight, bias, labels, workspace_bytes=workspace, **options)
    again = loss_and_gradients(hidden, weight, bias, labels, workspace_bytes=workspace, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    truth = reference.orpo_loss(wide[0], wide[1], labels, wide[2], **options)
    eps = torch.finfo(dtype).eps
    # float32 logits on a GPU of sm_80 or newer; rounded ones elsewhere.
    rounding = 1e-5 if gpu.real else max(1e-5, 4 * eps)
    torch.testing.assert_close(found[0].double(), truth.loss, rtol=rounding, atol=0)
    for ours, true in zip(found[1:], torch.autograd.grad(truth.loss, wide), strict=True):
        assert (ours.double() - true).norm() <= max(1e-5, 2 * eps) * true.norm()


def test_frozen_head_and_evaluation(gpu):
    hidden, weight, _, labels, _ = problem(gpu.device, torch.bfloat16)
    weight.requires_grad_(False)
    logps = linear_logps(hidden, weight, labels)
    with torch.no_grad():
        evaluated = linear_logps(hidden, weight, labels)
    if gpu.real:  # another GEMM, without logits: it sums in another order
        torch.testing.assert_close(evaluated, logps, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(evaluated, logps)
    true = reference.linear_logps(hidden.detach().double(), weight.double(), labels)
    if gpu.real:
        torch.testing.assert_close(logps.detach().double(), true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_mean(gpu, packed):
    values = -torch.rand(4, 5000, device=gpu.device)
    mask = torch.rand(4, 5000, device=gpu.device) < 0.7
    mask[2] = False
    given, ids = (values.requires_grad_(), torch.where(mask, 1, -100)), None
    if packed:
        order = torch.randperm(20000, device=gpu.device)
        given = tuple(each.flatten()[order] for each in given)
        ids = order // 5000
    # The second set, here the same, scores the first two sequences only.
    mean, count = sequence_mean(*given, given, sequence_ids=ids, num_sequences=4)
    (found,) = torch.autograd.grad(mean.sum(), values)
    tokens = mask.sum(1)
    assert torch.equal(count[0].long(), tokens)
    assert torch.equal(count[1], count[0] * torch.tensor([1, 1, 0, 0], device=gpu.device))
    true = torch.where(mask, values, 0).double().sum(1) / tokens.clamp(min=1)
    assert_accurate(mean[0].detach(), true.detach())
    assert torch.equal(mean[1, :2], mean[0, :2])
    sets = torch.tensor([2.0, 2.0, 1.0, 1.0], device=gpu.device)
    share = (sets / tokens.clamp(min=1))[:, None].expand_as(mask)
    torch.testing.assert_close(found, torch.where(mask, share, 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sets", [1, 2])
def test_pair_loss(gpu, sets):
    # 300 pairs: more than a block; some without a side. float64 takes the plain form.
    mean = -torch.rand(sets, 600, device=gpu.device)
    count = torch.randint(0, 9, mean.shape, device=gpu.device).float()
    mean[0, count[0] == 0] = torch.nan  # which must not be read
    found_mean, true_mean = mean.clone().requires_grad_(), mean.double().requires_grad_()
    found = pair_loss(found_mean, count, beta=0.3, by_token=sets == 2)
    true = pair_loss(true_mean, count.double(), beta=0.3, by_token=sets == 2)
    assert torch.equal(found.counts, true.counts)
    assert_accurate(found.loss.detach(), true.loss.detach())
    dfound = torch.autograd.grad(found.loss, found_mean)[0].double()
    torch.testing.assert_close(
        dfound, torch.autograd.grad(true.loss, true_mean)[0], rtol=2e-4, atol=1e-37
    )


def test_launches(gpu):
    # What the loss starts besides the op itself; `tests/ops/test_launches.py` counts on a CPU.
    gpu.needs_cuda()
    labels, nll_labels = problem(gpu.device, torch.float32)[3:]
    logps = [-torch.rand(labels.shape, device=gpu.device).requires_grad_() for _ in range(2)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        orpo_loss_from_logps(logps[0], labels, logps[1], nll_labels).loss.backward()
        torch.cuda.synchronize()
    kernels = [e.name for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # 18 on an H200: half of them are the fills of what the backward of a view or an op begins with.
    assert len(kernels) <= 20, kernels


def test_odds_ratio(gpu):
    edge = [-1e-9, -(2.0**-26), -1e-4, -0.69, -0.70, -5.0, -80.0, -700.0]
    chosen = torch.tensor([c for c in edge for _ in edge], device=gpu.device).requires_grad_()
    rejected = torch.tensor(edge * len(edge), device=gpu.device).requires_grad_()
    wide = [each.detach().double().requires_grad_() for each in (chosen, rejected)]
    loss, ratio = odds_ratio_loss(chosen, rejected)
    true_loss, true_ratio = reference.odds_ratio_loss(*wide)
    assert_accurate(loss.detach(), true_loss.detach())
    assert_accurate(ratio.detach(), true_ratio.detach())
    found = torch.autograd.grad((loss + 0.1 * ratio).sum(), (chosen, rejected))
    truth = torch.autograd.grad((true_loss + 0.1 * true_ratio).sum(), wide)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-4, atol=1e-37)


def test_no_wait_but_one(gpu):
    # The forward's count of scored rows, which the backward is told.
    gpu.needs_cuda()
    hidden, weight, _, labels, nll = problem(gpu.device, torch.bfloat16)

    def run():
        loss_and_gradients(hidden, weight, None, labels, nll_labels=nll)

    run()
    assert [path.name for path in waits(run)] == ["scoring.py"]


def test_cuda_graph(gpu):
    gpu.needs_cuda()
    hidden, weight, bias, labels, nll = problem(gpu.device, torch.bfloat16, bias=True)
    labels[:, 7] = -100
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, loads cuBLAS
        for _ in range(3):
            loss_and_gradients(hidden, weight, bias, labels, nll_labels=nll)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(hidden, weight, bias, labels, nll_labels=nll)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
        labels[:, 9] = seed  # other tokens scored than when it was captured
        labels[:, 10 + seed] = -100
        graph.replay()
        eager = loss_and_gradients(hidden, weight, bias, labels, nll_labels=nll)
        torch.testing.assert_close(captured[0], eager[0], rtol=1e-5, atol=0)
        for ours, true in zip(captured[1:], eager[1:], strict=True):
            assert (ours - true).norm() <= 1e-2 * true.norm()


@pytest.mark.slow  # on a GPU
def test_compiled(gpu):
    hidden, weight, bias, labels, nll = problem(gpu.device, torch.bfloat16, bias=True)

    def loss(hidden, weight, bias):
        return orpo_loss(hidden, weight, labels, bias, nll_labels=nll).loss

    backend = "inductor" if gpu.real else "aot_eager"
    compiled = torch.compile(loss, backend=backend)
    found = compiled(hidden, weight, bias)
    torch.testing.assert_close(found, loss(hidden, weight, bias), rtol=1e-5, atol=0)
    found.backward()
    assert torch.isfinite(hidden.grad).all()


def test_peak_is_the_workspace(gpu):
    gpu.needs_cuda()
    budget, N = 64 * 2**20, 4096
    weight = torch.randn(128256, 1024, device=gpu.device, dtype=torch.bfloat16)
    hidden = torch.randn(N, 1024, device=gpu.device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 128256, (N,), device=gpu.device)
    for _ in range(2):  # the first allocates cuBLAS's own workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = linear_logps(hidden, weight, labels, workspace_bytes=budget)
        peak = torch.cuda.max_memory_allocated() - before
        kept = torch.cuda.memory_allocated() - before
        del logps
    assert peak - kept <= budget


@pytest.mark.parametrize("bad", [-1, V])
def test_what_is_no_label_is_an_error_and_the_device_lives_on(gpu, bad):
    hidden, weight, _, labels, _ = problem(gpu.device, torch.bfloat16)
    wrong = labels.clone()
    wrong[-1, -1] = bad
    with pytest.raises(ValueError, match=f"got {bad}; is the tokenizer larger"):
        loss_and_gradients(hidden, weight, None, wrong)
    assert loss_and_gradients(hidden, weight, None, labels)[0].isfinite()


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("mib", [24, 160])
def test_a_large_head_in_a_small_budget(gpu, gradient, mib):
    # Llama 3's vocabulary: many tiles of which P takes the logits' memory, and with 24 MiB rows in
    # that of dW; vocabulary blocks of the sparse gradient that are wider than 8,192 columns.
    gpu.needs_cuda()
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    N, H, V = 3000, 1024, 128256
    torch.manual_seed(0)
    weight = torch.randn(V, H, device=gpu.device).bfloat16().requires_grad_()
    labels, others = torch.randint(0, V, (2, N), device=gpu.device)
    with torch.no_grad():  # probabilities of about 2/3, 1/4, and the rest of all others
        hidden = (weight[labels] * 14 + weight[others] * 13) / H
    hidden.requires_grad_()
    a = torch.rand(N, device=gpu.device) - 0.5
    options = {"gradient": gradient, "workspace_bytes": mib * 2**20}
    logps = linear_logps(hidden, weight, labels, **options)
    dhidden, dweight = torch.autograd.grad((logps * a).sum(), (hidden, weight))

    wide, true = weight.detach().double(), torch.zeros(V, H, dtype=torch.float64, device=gpu.device)
    for rows in torch.arange(N, device=gpu.device).split(500):
        h = hidden.detach()[rows].double()
        p = torch.softmax(h @ wide.t(), 1)
        p[torch.arange(len(rows)), labels[rows]] -= 1.0
        p *= -a[rows, None].double()
        true += p.t() @ h
        of_rows = p @ wide
        # Of the definition in float64 the sparse gradient is 4.2e-3 off here, dW 4e-4.
        assert (dhidden[rows].double() - of_rows).norm() < 1e-2 * of_rows.norm()
    assert (dweight.double() - true).norm() < 6e-3 * true.norm()
