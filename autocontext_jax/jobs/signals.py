"""SIGTERM and Ctrl-C end a training run cleanly, after the step in hand."""

import dataclasses
import signal
import threading

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass
class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that is answered after the step in hand; a second one ends at once."""

    received: bool = False

    def __post_init__(self):
        # With several processes JAX itself receives the SIGTERM of any, and all agree on the step to stop after.
        self._before = {}
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            return  # Python lets the main thread alone set handlers
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number, frame):
        del number, frame
        self.received = True
        self.close()

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; all processes call it at every step."""
        return self.received if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Restores the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
