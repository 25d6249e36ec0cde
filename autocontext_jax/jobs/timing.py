"""How many training steps fit the minutes of a plan: the real jobs are timed on the run's own data."""

import contextlib
import dataclasses
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_json
from autocontext_jax.jobs.config_files import config_from_flat
from autocontext_jax.jobs.evaluate import evaluate_run, evaluate_validation
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.plan import read_plan, write_plan
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import RunData, has_begun
from autocontext_jax.jobs.train import train
from autocontext_jax.planning import choices as topics
from autocontext_jax.planning.plan import Choices

log = logging.getLogger(__name__)

FOLDER = "timing"  # in the run folder, while it lasts
ROWS = 20  # of metrics.jsonl that the timed steps write
SHARE = 0.02  # of the steps that the plan expects are timed
SPARE = 0.03  # of the time that is left is kept for what is slower later
COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX's event when a program is compiled


def fit_minutes(
    config: RunConfig,
    workdir: Path,
    data: RunData,
    extensions: Extensions,
    *,
    started: float,
    runs: int = 1,
    evaluates: str = "",
) -> RunConfig | None:
    """The planned configuration with so many training steps that the job ends in time.

    A few steps are trained, checkpoint and validation with them, and two scans are predicted and scored, in a folder of
    their own. A run that has begun keeps its steps.

    Args:
      config: as planned.
      workdir: the run folder, or that of all folds.
      data: prepared; of one of the runs.
      extensions: networks, losses and metrics from outside the package.
      started: when the job did, of `time.monotonic`.
      runs: that share the minutes.
      evaluates: what follows the training: "run" or "validation", see `evaluate`; "" nothing.

    Returns:
      None if a signal ended it.

    Raises:
      UserError: no time is left for training.
    """
    folder = workdir / FOLDER
    processes.first_does(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a start that was killed
    plan = read_plan(workdir)
    if not config.plan.minutes or plan is None or plan.timed or has_begun(workdir) or "train.steps" in plan.given:
        return config
    log.info("timing the training and the evaluation")
    try:
        timed = time.monotonic()
        trained = _time_training(config, folder, data, extensions)
        if trained is None:
            return None
        step, beside, checkpoint = trained
        scoring = _time_evaluation(config, folder, data, extensions, evaluates) if evaluates else 0.0
        spent = time.monotonic() - timed
    finally:
        processes.first_does(lambda: shutil.rmtree(folder, ignore_errors=True))
    left = (60 * config.plan.minutes - (time.monotonic() - started)) / runs
    phases = len(config.phases())
    seconds = (1 - SPARE) * (left - scoring) / phases - beside
    if every := plan.given.get("train.checkpoint_every"):
        steps = int(seconds / (step + checkpoint / every))
        further = max(0, steps) / every * checkpoint
    else:
        further = 9 * checkpoint  # of the ten that a plan chooses; one is in the timed run
        steps = int((seconds - further) / step)
    beside, seconds = beside + further, seconds - further
    steps = min(processes.gather(steps))
    if steps < 1:
        needed = beside * phases + scoring
        shared = f" for the {runs} runs that share them" if runs > 1 else ""
        raise UserError(
            f"plan.minutes is {config.plan.minutes:g}, and nothing of it is left for training: "
            f"{time.monotonic() - started:.0f} s have passed, {spent:.0f} s of them to time what follows, and each run "
            f"takes {needed:.0f} s beside its steps, for start, validations, checkpoints and its evaluation; expected "
            f"more minutes{shared}. Another start is faster where compiled programs are kept"
        )
    if seconds < 0.5 * 60 * config.plan.minutes / runs / phases:
        log.warning("plan.minutes is %g, and only %.0f s of it are left for training", config.plan.minutes, seconds)
    reason = (
        f"{config.plan.minutes:g} minutes in all: a step takes {step:.2g} s, start, validations and checkpoints "
        f"{beside:.0f} s, the evaluation {scoring:.0f} s; measured in {spent:.0f} s."
    )
    chosen = Choices(plan.given)
    topics.choose_steps(chosen, steps, reason)
    made = plan.with_choices(chosen.made, timed=True)
    processes.first_does(lambda: write_plan(made, workdir))
    log.info("%d steps: %s", steps, reason)
    return config_from_flat(config, {key: choice.value for key, choice in chosen.made.items()})


def _time_training(
    config: RunConfig, folder: Path, data: RunData, extensions: Extensions
) -> tuple[float, float, float] | None:
    """Seconds of a step, of a phase beside its steps (start, a validation, a checkpoint), and of a further checkpoint.

    Of several phases the averages. None if a signal ended it.
    """

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "split.json", data.split.to_json())
        write_json(folder / "fingerprint.json", data.fingerprint.to_json())

    processes.first_does(begin)
    steps = int(np.clip(config.train.steps * SHARE, 2 * ROWS, 10 * ROWS)) // ROWS * ROWS
    changes = {"train.steps": steps, "train.checkpoint_every": steps, "train.log_every": steps // ROWS}
    short = config_from_flat(config, {**changes, "optimizer.warmup": 1, "train.keep": 1})
    with _clock() as seconds_passed:
        if not train(short, folder, data, extensions):
            return None
        whole = seconds_passed()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    phases = len(config.phases())
    rates = np.array([row["patches_per_second"] for row in rows]).reshape(phases, ROWS)
    step = float(np.mean([_step_seconds(config, each) for each in rates]))
    beside = max(0.0, whole / phases - steps * step)
    # Beside a second for a checkpoint, forward passes over the held-out patches, a third of a step each.
    batches = -(-config.train.validation_patches // config.loader.batch_size) if data.validation else 0
    return step, beside, 1.0 + batches * step / 3


def _step_seconds(config: RunConfig, rates: np.ndarray) -> float:
    """Seconds of a step, from the rows of a phase in patches a second."""
    frozen = config.train.frozen_batch_stats
    first = ROWS - round(frozen * ROWS)  # the row in which frozen statistics begin
    # The first half of both is left out: programs are compiled then, and no batches have been read ahead.
    parts = [part[len(part) // 2 :] for part in (rates[:first], rates[first:]) if part.size]
    weights = [1 - frozen, frozen][: len(parts)]
    seconds = [config.loader.batch_size / float(np.median(part)) for part in parts]
    return float(np.average(seconds, weights=weights if sum(weights) else None))


def _time_evaluation(config: RunConfig, folder: Path, data: RunData, extensions: Extensions, evaluates: str) -> float:
    """Seconds that all scans to be evaluated take, from one of them and from three."""
    side = "validation" if evaluates == "validation" or not data.test else "test"
    cases = data.validation if side == "validation" else data.test
    if not cases:
        return 0.0
    function: Callable[..., bool] = evaluate_validation if evaluates == "validation" else evaluate_run
    seconds = []
    for number in (1, 3):
        if number > len(cases):
            break
        chosen = {case.name for case in cases[:number]}
        left = {
            name: dataclasses.replace(case, side=case.side if case.side != side or name in chosen else "unused")
            for name, case in data.split.cases.items()
        }
        part = dataclasses.replace(data, split=dataclasses.replace(data.split, cases=left))
        with _clock() as seconds_passed, contextlib.redirect_stdout(io.StringIO()):
            function(config, folder, part, extensions)
            seconds.append(seconds_passed())
    each = (seconds[-1] - seconds[0]) / 2 if len(seconds) == 2 else seconds[0]
    return seconds[0] + each * (len(cases) - 1)


@contextlib.contextmanager
def _clock() -> Iterator[Callable[[], float]]:
    """Seconds since it began; it stands still while this thread compiles a program that the job itself finds kept."""
    kept, thread, compiling = bool(jax.config.values["jax_compilation_cache_dir"]), threading.get_ident(), 0.0

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal compiling
        if event == COMPILATION and kept and threading.get_ident() == thread:
            compiling += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    started = time.monotonic()
    try:
        yield lambda: time.monotonic() - started - compiling
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
