"""The demo with a few steps: every stage runs, and the verdict reads what the runs wrote."""

import json

import pytest

from examples import demo

pytest.importorskip("bitsandbytes")


def test_demo_smoke(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["demo", "--smoke", f"--out={out}"])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for number in range(1, 6):
        assert f"[{number}/5]" in printed
    assert "$ orpo-kernels train" in printed
    for name in (
        "data/train.jsonl",
        "base/model.safetensors",
        "orpo/report.png",
        "sft/metrics.json",
    ):
        assert (out / name).is_file()
    assert (out / "orpo-vs-sft.png").read_bytes().startswith(b"\x89PNG")


def test_demo_keeps_other_folders(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["demo", "--smoke", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="choose another --out"):
        demo.main()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("after", "risen"), [(0.9, True), (0.55, False), (0.2, False)])
def test_verdict(after, risen, tmp_path):
    figures = {"logps/chosen": -1.0, "logps/rejected": -1.0}
    for name in ("orpo", "sft"):
        (tmp_path / name).mkdir()
        metrics = {
            "eval_first": {"rewards/accuracies": 0.5, **figures},
            "eval_last": {"rewards/accuracies": after, **figures},
        }
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    assert demo.verdict(tmp_path) == risen
