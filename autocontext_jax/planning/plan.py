"""A plan: the value of each key that was chosen for a data set, with a sentence of reason; and its texts and files."""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from autocontext_jax.errors import require

FORMAT = 1  # of plan.json


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What is chosen for the data set and the device, see `jobs/plan.py`.

    Attributes:
      automatic: whether a plan chooses every key that was left at its default.
      minutes: of wall clock that the whole job may take, from reading the data set to the evaluation; 0 leaves
        `train.steps` as it is, and plans a step for a day. Of several folds, all together.
      memory: GiB of a device that a training step may take; 0 is what it has free, of a CPU half of that.
      keep: further keys that stay as they are, such as ("levels.factors",), though they have their default value. Those
        of the command line are among them.
    """

    automatic: bool = False
    minutes: float = 0.0
    memory: float = 0.0
    keep: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("minutes", "memory"):
            require(getattr(self, name) >= 0, self, name, "0 or more")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The value of a key and why it was chosen: one sentence."""

    value: Any
    reason: str


class Choices:
    """Collects the choices of a plan, in which keys that the user has set stay as they are.

    Args:
      given: values of the keys that the user has set, by dotted names such as "loader.batch_size".
    """

    def __init__(self, given: Mapping[str, Any]):
        self.given = given
        self.made: dict[str, Choice] = {}

    def choose(self, key: str, value: Any, reason: str) -> Any:
        """Chooses the value of a key, unless it is given; returns the value that counts."""
        if key in self.given:
            return self.given[key]
        self.made[key] = Choice(value, reason)
        return value


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen for a run.

    Attributes:
      made_from: a checksum of what it depends on.
      choices: of each key that was planned.
      given: values of the keys that were set otherwise than by default, and stay.
      needs: what the run will take, a line each: memory, disk and time.
      timed: whether the number of steps is one that was timed with the run's own data.
    """

    made_from: str
    choices: Mapping[str, Choice]
    given: Mapping[str, Any]
    needs: tuple[str, ...]
    timed: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """The planned value of each key."""
        return {key: choice.value for key, choice in self.choices.items()}

    def with_choices(self, more: Mapping[str, Choice], **changes: Any) -> "Plan":
        """The plan with further or other choices, but none for a key that is given."""
        added = {key: choice for key, choice in more.items() if key not in self.given}
        return dataclasses.replace(self, choices={**self.choices, **added}, **changes)

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it."""
        choices = {key: dataclasses.asdict(choice) for key, choice in self.choices.items()}
        return {"format": FORMAT, **dataclasses.asdict(self), "choices": choices}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """What `to_json` gave."""
        choices = {key: Choice(_tuples(entry["value"]), entry["reason"]) for key, entry in content["choices"].items()}
        given = {key: _tuples(value) for key, value in content["given"].items()}
        return cls(content["made_from"], choices, given, tuple(content["needs"]), content["timed"])


def config_file(plan: Plan, *, title: str, path: str) -> str:
    """The plan as a config file: Python, to be read, changed and used for other runs.

    Args:
      plan: the plan.
      title: what was planned.
      path: of the file, for the command in its docstring.
    """
    lines = [f'"""{title}', "", *(f"{line}" for line in plan.needs), ""]
    lines += [f"    autocontext --config {path} --workdir FOLDER", '"""', ""]
    lines += ["from autocontext_jax.jobs.config_files import default_config", "", "", "def get_config():"]
    lines += ["    config = default_config()", *_assignments(plan), "    return config", ""]
    return "\n".join(lines)


def _assignments(plan: Plan) -> Iterator[str]:
    if plan.given:
        yield "    # Set by the user:"
    for key, value in plan.given.items():
        yield f"    config.{key} = {value!r}"
    for key, choice in plan.choices.items():
        yield from textwrap.wrap(choice.reason, 114, initial_indent="    # ", subsequent_indent="    # ")
        yield f"    config.{key} = {choice.value!r}"


def plan_table(plan: Plan) -> str:
    """The plan in lines of text, for the log: each key with its value, below it the reason."""
    lines = []
    for key, choice in plan.choices.items():
        lines.append(f"{key} = {choice.value!r}")
        lines += textwrap.wrap(choice.reason, 112, initial_indent="    ", subsequent_indent="    ")
    if plan.given:
        lines.append("set by the user, and not planned: " + ", ".join(f"{k} = {v!r}" for k, v in plan.given.items()))
    return "\n".join([*lines, *plan.needs])


def _tuples(value: Any) -> Any:
    """A value as configurations have it: JSON keeps tuples as lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
