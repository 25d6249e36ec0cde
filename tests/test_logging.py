"""metrics.jsonl holds one object a logged step, also when a run dies and starts again."""

import json

import numpy as np

from autocontext_jax.training.logging import MetricsLog


def test_steps_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step / 10})
    log.image(3, "picture", np.zeros((4, 5, 3), np.uint8))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # the kill came here
    log = MetricsLog(tmp_path, step=2)
    log.scalars(3, {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5}]
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
    """Python's own NaN is no JSON: other readers refuse the whole file."""
    log = MetricsLog(tmp_path, step=0)
    log.scalars(1, {"loss": float("nan"), "gradient_norm": float("inf"), "dice": 0.5})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "gradient_norm": None, "dice": 0.5}
