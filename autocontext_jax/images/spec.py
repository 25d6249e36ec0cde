"""What the channels of an image are: how they are normalised, stored and seen by networks.

Channels of CT are stored in HU, and networks normalise them. All other channels are normalised before they are stored:
their values depend on the scanner, and what is known of one scan is enough for it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autocontext_jax.errors import UserError, require

AIR = -1024  # HU outside a CT scan

# As nnU-Net names them, and as the name of a channel chooses them in small or capital letters; every other name, such
# as "T2", means `zscore`.
NORMALIZATIONS = ("CT", "zscore", "rescale_to_0_1", "rgb_to_0_1", "noNorm")


@dataclasses.dataclass(frozen=True)
class Channel:
    """A channel of an image.

    Attributes:
      name: as the data set calls it.
      normalization: `CT`: clipped to `window`, less `mean`, divided by `std`; `zscore`: less the scan's own mean,
        divided by its standard deviation; `rescale_to_0_1`: the scan's lowest value becomes 0, its highest 1;
        `rgb_to_0_1`: divided by 255; `noNorm`: as it is.
      window: of CT, the lowest and the highest HU; () where it is still to be learned from the training scans.
      mean: of CT, HU.
      std: of CT, HU.
    """

    name: str
    normalization: str
    window: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        require(self.normalization in NORMALIZATIONS, self, "normalization", f"one of {', '.join(NORMALIZATIONS)}")
        good = not self.window or (len(self.window) == 2 and self.window[0] < self.window[1])
        require(good and (self.is_ct or not self.window), self, "window", "(low, high) in HU with low < high, for CT")
        require(self.std > 0, self, "std", "more than 0")

    @property
    def is_ct(self) -> bool:
        """Whether its values are HU."""
        return self.normalization == "CT"

    @property
    def padding(self) -> float:
        """The stored value of voxels outside a scan."""
        return AIR if self.is_ct else 0.0


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The channels of every image of a run.

    Attributes:
      channels: [C], in the order of their files.
      cut_out: whether the scans' background is 0 around what they show, as where the skull was removed: `zscore` is
        then that of the other voxels, and the background stays 0.
    """

    channels: tuple[Channel, ...]
    cut_out: bool = False

    def __post_init__(self):
        require(1 <= len(self.channels) <= 1000, self, "channels", "1 to 1000 channels")

    @property
    def names(self) -> str:
        """The channels, as messages name them."""
        return ", ".join(channel.name for channel in self.channels)

    @property
    def dtype(self) -> Any:
        """Of stored voxels: int16 of CT alone, else float32."""
        return np.dtype(np.int16 if all(channel.is_ct for channel in self.channels) else np.float32)

    @property
    def padding(self) -> np.ndarray:
        """[C, 1, 1, 1] of `dtype`, the stored values outside a scan."""
        return np.array([channel.padding for channel in self.channels], self.dtype)[:, None, None, None]

    @property
    def learned(self) -> bool:
        """Whether nothing is left to be learned from the training scans."""
        return all(channel.window for channel in self.channels if channel.is_ct)

    @property
    def declared(self) -> "ImageSpec":
        """The same without what was learned from the training scans."""
        channels = tuple(Channel(channel.name, channel.normalization) for channel in self.channels)
        return dataclasses.replace(self, channels=channels)

    @property
    def ct(self) -> tuple[int, ...]:
        """Numbers of the channels that are CT."""
        return tuple(number for number, channel in enumerate(self.channels) if channel.is_ct)

    @property
    def stored_as(self) -> list[Any]:
        """What stored voxels depend on, as JSON; not the window, which networks apply."""
        return [*(channel.normalization for channel in self.channels), self.cut_out]

    def scaling(self) -> tuple[np.ndarray, ...]:
        """How networks normalise stored values x: clip((x - low) * gain + offset, bottom, top).

        Returns:
          low, gain, offset, bottom, top: [C] float32 each. What was normalised before it was stored stays as it is.
        """
        rows = []
        for channel in self.channels:
            if channel.is_ct:
                low, high = channel.window
                bottom, top = ((edge - channel.mean) / channel.std for edge in (low, high))
                rows.append((low, 1 / channel.std, bottom, bottom, top))
            else:
                rows.append((0.0, 1.0, 0.0, -math.inf, math.inf))
        return tuple(np.array(rows, np.float32).T)


def fixed_window(channel: Channel, window: Sequence[float]) -> Channel:
    """A channel of CT with a window, (low, high) in HU, which becomes [-1, 1]."""
    low, high = window
    return dataclasses.replace(channel, window=(low, high), mean=(low + high) / 2, std=(high - low) / 2)


def ct_image(window: Sequence[float] = (-500.0, 500.0)) -> ImageSpec:
    """CT with a fixed window, (low, high) in HU, which becomes [-1, 1]."""
    return ImageSpec((fixed_window(Channel("CT", "CT"), window),))


CT = ct_image()


def image_spec(names: Sequence[str], normalization: Sequence[str], window: Sequence[float]) -> ImageSpec:
    """The channels that a data set and a configuration describe; CT without a window has it still to learn.

    Args:
      names: [C] of the channels.
      normalization: [C], what the names do not choose well; () leaves it to them.
      window: (low, high) in HU for CT, or ().

    Raises:
      UserError: another number of channels; a window, and no CT.
    """
    if normalization and len(normalization) != len(names):
        raise UserError(
            f"config key data.normalization is {tuple(normalization)}; expected one for each of the "
            f"{len(names)} channels of the data set ({', '.join(names)}), or ()"
        )
    by_name = {known.casefold(): known for known in NORMALIZATIONS}
    chosen = normalization or [by_name.get(name.casefold(), "zscore") for name in names]
    channels = [Channel(name, scheme) for name, scheme in zip(names, chosen, strict=True)]
    if window and not any(channel.is_ct for channel in channels):
        raise UserError(
            f"config key data.window is {tuple(window)}, and no channel of the data set is CT ({', '.join(names)}): "
            "expected (), or data.normalization=('CT',)"
        )
    if window:
        channels = [fixed_window(channel, window) if channel.is_ct else channel for channel in channels]
    return ImageSpec(tuple(channels))


def with_statistics(spec: ImageSpec, learned: Mapping[int, tuple[float, float, float, float]]) -> ImageSpec:
    """The channels with what was learned of CT: {number of the channel: (low, high, mean, std) in HU}."""
    channels = list(spec.channels)
    for number, (low, high, mean, std) in learned.items():
        channels[number] = dataclasses.replace(channels[number], window=(low, high), mean=mean, std=std)
    return dataclasses.replace(spec, channels=tuple(channels))
