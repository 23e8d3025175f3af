"""The scripts that time whole steps, once, tiny, on a CPU: every row, and what is no figure."""

import json
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from benchmarks import layout_steps, model_step
from benchmarks.layout_steps import LAYOUTS, TRL, Done
from benchmarks.turns import ratios, take_turns

LOSSES = [TRL, "ours, 64 MiB", "ours, default", "ours, shared prompt"]
TINY = ["--device", "cpu", "--tiny"]


def layouts(tmp_path: Any, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and rows of a run with one pair to a batch."""
    words = [*TINY, "--pairs", "1", "--json", str(tmp_path / "out.json"), *more]
    status = layout_steps.main(words)
    return status, json.loads((tmp_path / "out.json").read_text())["results"]


def models(tmp_path: Any, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and rows of a run."""
    status = model_step.main([*TINY, "--json", str(tmp_path / "out.json"), *more])
    return status, json.loads((tmp_path / "out.json").read_text())["results"]


def test_turns_and_their_neighbours() -> None:
    # A takes 1, 3, 5 s; B takes 4 s between them, of 2 and of 4 on average.
    order, own = [], iter((1.0, 3.0, 5.0))
    turns = {"A": lambda: order.append("A") or next(own), "B": lambda: order.append("B") or 4.0}
    seen: list[int] = []
    taken = take_turns(turns, rounds=2, after_round=lambda taken: seen.append(len(taken["B"])))
    assert (order, seen) == (["A", "B", "A", "B", "A"], [1, 2])
    assert ratios(taken, "B") == [2.0, 1.0]
    # What is late takes one round, which a figure needs.
    own = iter((1.0, 3.0))
    assert take_turns(turns, rounds=2, until=0.0) == {"A": [1.0, 3.0], "B": [4.0]}


def test_layouts(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = layouts(tmp_path)
    assert status == 0
    assert [row["implementation"] for row in rows] == [TRL, *LAYOUTS]
    assert all(row["speed_of_trl"]["median"] > 0 and "losses" not in row for row in rows)
    computed = [row["computed_tokens"] / row["tokens"] for row in rows]
    assert computed[0] == computed[1] > computed[2] > 1 > computed[3]
    printed = capsys.readouterr().out
    assert all(f"tiny P1        {name}" in printed for name in (TRL, *LAYOUTS))


def test_what_there_is_no_time_for_in_a_case(tmp_path: Any, monkeypatch: Any) -> None:
    # One layout is timed however late it is: what was compiled for it is worth a figure.
    late = layout_steps.run_case

    def run_case(steps: Any, case: Any, until: float, *rest: Any) -> None:
        late(steps, case, 0.0, *rest)

    monkeypatch.setattr(layout_steps, "run_case", run_case)
    status, rows = layouts(tmp_path)
    assert status == 0
    assert ["time_ms" in row for row in rows] == [True, True, False, False]
    assert {row.get("skipped") for row in rows[2:]} == {"no time left in this run"}


def test_another_loss_than_trls_is_no_figure(tmp_path: Any, monkeypatch: Any) -> None:
    right = layout_steps.loss_of

    def wrong(model: Any, name: str, device: str) -> Any:
        loss = right(model, name, device)
        if name != "packed":
            return loss
        return lambda batch: Done(loss(batch).loss * 1.01)

    monkeypatch.setattr(layout_steps, "loss_of", wrong)
    status, rows = layouts(tmp_path)
    assert status == 1
    assert [row["implementation"] for row in rows if "failed" in row] == ["packed"]
    assert [row["implementation"] for row in rows if "time_ms" not in row] == ["packed"]


@pytest.mark.parametrize(
    ("error", "outcome", "expected"),
    [
        (NotImplementedError("no mask"), "skipped", 0),
        (RuntimeError("no code\nat all"), "failed", 1),
    ],
)
def test_an_error_of_one_row_is_its_own(
    tmp_path: Any, monkeypatch: Any, error: Exception, outcome: str, expected: int
) -> None:
    right = layout_steps.loss_of

    def wrong(model: Any, name: str, device: str) -> Any:
        if name == "packed":
            raise error
        return right(model, name, device)

    monkeypatch.setattr(layout_steps, "loss_of", wrong)
    status, rows = layouts(tmp_path)
    assert status == expected
    assert [row.get(outcome) for row in rows] == [
        None, None, f"{type(error).__name__}: {str(error).splitlines()[0]}", None,
    ]  # fmt: skip
    assert all("time_ms" in row for row in rows if outcome not in row)


@pytest.mark.parametrize("run", [layouts, models])
def test_out_of_time_before_the_first_row(run: Any, tmp_path: Any, capsys: Any) -> None:
    # What imports took counts: the file is there, and says that there is nothing.
    late = ("--minutes", "-1") if run is layouts else ("--seconds", "-1")
    assert run(tmp_path, *late) == (0, [])
    assert "out of time before tiny" in capsys.readouterr().out


def test_what_is_there_of_a_run_that_is_ended(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(layout_steps, "ROUNDS", {"cpu": 3})
    turn, count = layout_steps.Steps.turn, [0]

    def ended(steps: Any, name: str) -> float:
        count[0] += 1
        if count[0] > 5:
            raise KeyboardInterrupt
        return turn(steps, name)

    monkeypatch.setattr(layout_steps.Steps, "turn", ended)
    with pytest.raises(KeyboardInterrupt):
        layouts(tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["time_ms"]["median"] > 0 for row in rows] == [True] * 4


def test_models(tmp_path: Any) -> None:
    status, rows = models(tmp_path)
    assert status == 0
    assert [row["loss"] for row in rows] == LOSSES
    assert all(row["of_trl"]["median"] > 0 for row in rows)
    assert all(row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=2e-2) for row in rows)


def test_a_quantised_model_draws_nothing_on_the_cpu_but_itself() -> None:
    # Weights that a layer begins with and loses were half a minute of an 8B model's on a GPU.
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(128, 64))
    state, weight = torch.get_rng_state(), model[0].weight.detach().clone()
    model_step.quantise(model, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.dtype == torch.uint8
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    found, true = model[0](x).float(), x.float() @ weight.t()
    assert (found - true).norm() < 0.15 * true.norm()  # of 4 bits


def test_inputs_of_layers_are_moved_in_the_row_of_offload(monkeypatch: Any) -> None:
    # Here to another tensor, as to pinned memory, which a CPU does not have.
    import transformers.modeling_utils

    moved: list[int] = []

    @contextmanager
    def hooks(**options: Any) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            moved.append(tensor.numel())
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.clone()):
            yield

    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", hooks)
    T, config = 64, model_step.TINY
    model = model_step.build(model_step.Model("tiny", "llama", config, False, ()), "cpu")
    kept = model_step.our_loss(model, T, config["vocab_size"], "cpu")
    losses = {"kept": kept, "offload": model_step.offloaded(model, kept)}
    steps = model_step.Steps(model, losses, "cpu")
    for name, layers in (("kept", 0), ("offload", config["num_hidden_layers"]), ("kept", 0)):
        moved.clear()
        steps.turn(name)
        assert moved == layers * [2 * T * config["hidden_size"]]
