"""All kinds of faults, each with its words in the table and its share of a campaign."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from fault_concurrency import read_while_saving, two_runs
from fault_damage import damaged_checkpoint, damaged_json, damaged_store, damaged_store_read, vanished
from fault_disks import full_disk, read_only
from fault_kills import kill_evaluate, kill_one_of_two, kill_predict, kill_prepare, kill_train, kill_worker
from fault_runs import UndisturbedRun


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
      fault: what it is, for the table.
      job: what it strikes, for the table.
      share: how many there are of it in a campaign of the default size.
      strike: makes one in a new folder; raises `Wrong` if it was not survived, `NotPossible` if it cannot be made.
    """

    fault: str
    job: str
    share: int
    strike: Callable[[UndisturbedRun, random.Random, Path], None]


KINDS = {
    "kill_prepare": Kind("SIGKILL", "prepare", 20, kill_prepare),
    "kill_train": Kind("SIGKILL", "train", 26, kill_train),
    "kill_evaluate": Kind("SIGKILL", "evaluate", 12, kill_evaluate),
    "kill_predict": Kind("SIGKILL", "predict", 12, kill_predict),
    "kill_one_of_two": Kind("SIGKILL of one of two processes", "train", 6, kill_one_of_two),
    "worker": Kind("SIGKILL of a worker process", "prepare", 8, kill_worker),
    "full_prepare": Kind("full disk", "prepare", 4, full_disk("prepare", "phantoms", 120_000)),
    "full_train": Kind("full disk", "train", 9, full_disk("train", "prepared", 900_000)),
    "full_evaluate": Kind("full disk", "evaluate", 5, full_disk("evaluate", "trained", 120_000)),
    "full_predict": Kind("full disk", "predict", 4, full_disk("predict", "trained", 8_192)),
    "read_only_prepare": Kind("read-only work directory", "prepare", 2, read_only("prepare", "phantoms")),
    "read_only_train": Kind("read-only work directory", "train", 2, read_only("train", "8")),
    "read_only_evaluate": Kind("read-only work directory", "evaluate", 2, read_only("evaluate", "trained")),
    "read_only_predict": Kind("read-only work directory", "predict", 3, read_only("predict", "trained")),
    "checkpoint_train": Kind("damaged checkpoint", "train", 13, damaged_checkpoint("train")),
    "checkpoint_evaluate": Kind("damaged checkpoint", "evaluate", 10, damaged_checkpoint("evaluate")),
    "checkpoint_predict": Kind("damaged checkpoint", "predict", 8, damaged_checkpoint("predict")),
    "config_train": Kind("damaged config.json", "train", 4, damaged_json("config.json", "train")),
    "config_evaluate": Kind("damaged config.json", "evaluate", 4, damaged_json("config.json", "evaluate")),
    "config_predict": Kind("damaged config.json", "predict", 4, damaged_json("config.json", "predict")),
    "split_train": Kind("damaged split.json", "train", 4, damaged_json("split.json", "train")),
    "split_evaluate": Kind("damaged split.json", "evaluate", 4, damaged_json("split.json", "evaluate")),
    "store_train": Kind("damaged store", "train", 7, damaged_store),
    "store_read": Kind("damaged store", "reading alone", 50, damaged_store_read),
    "vanished_prepare": Kind("vanished scan or label", "prepare", 3, vanished("prepare")),
    "vanished_train": Kind("vanished scan or label", "train", 3, vanished("train")),
    "vanished_evaluate": Kind("vanished scan or label", "evaluate", 3, vanished("evaluate")),
    "two_train": Kind("two runs at once", "train", 3, two_runs("train", "prepared")),
    "two_evaluate": Kind("two runs at once", "evaluate", 2, two_runs("evaluate", "trained")),
    "read_while_saving": Kind("predict and evaluate during a save", "train", 5, read_while_saving),
}
