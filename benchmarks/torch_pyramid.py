"""The pyramid in PyTorch with the same parameters: the peer beside which our steps and predictions are measured."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from autocontext_jax.models.convolution import Deconvolution
from autocontext_jax.models.normalization import EPSILON
from autocontext_jax.models.pyramid import Pyramid


def to_torch(pyramid: Pyramid) -> "TorchPyramid":
    """A PyTorch module that computes what `pyramid` (softmax context) computes, from a copy of its parameters.

    In training mode it normalises with batch statistics, in eval mode with the copied running averages.
    """
    config = pyramid.config
    assert config.context == "softmax", "the peer has softmax context only"
    assert not config.stop_gradient, "the peer is differentiable end to end"
    (channel,) = config.image.channels
    return TorchPyramid([_unet(network) for network in pyramid.networks], channel.window)


def total_loss(logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """`training.losses.total_loss` with its defaults: the sum over levels of the Dice loss.

    Args:
      logits: for each level [B, K, N, N, N].
      labels: for each level [B, N, N, N], int64.
    """
    return sum(
        (_dice_loss(*level) for level in zip(logits, labels, strict=True)), labels[0].new_zeros((), dtype=torch.float32)
    )


def training_and_prediction(
    pyramid: Pyramid,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    dtype: str,
    *,
    layouts: Sequence[str] = ("NCDHW", "NDHWC"),
) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """A training step with Adam (returning its loss) and a forward pass in eval mode, in eager PyTorch.

    They run on the first GPU if PyTorch has one, in TF32 if `dtype` is float32; else on the CPU with all its cores. In
    bfloat16 they run under autocast. What they return may still be under way on the GPU.

    Args:
      pyramid: gives the parameters.
      images: for each level [B, N, N, N, 1] in HU.
      labels: for each level [B, N, N, N], uint8.
      dtype: `float32` or `bfloat16`.
      layouts: of the memory.

    Returns:
      `train` and `predict`, a call a layout each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    inputs = [torch.from_numpy(image[..., 0]).to(device) for image in images]
    targets = [torch.from_numpy(label).long().to(device) for label in labels]
    calls: dict[str, dict[str, Callable[[], torch.Tensor]]] = {"train": {}, "predict": {}}

    def narrow() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    for name in layouts:
        layout = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}[name]
        model, frozen = (to_torch(pyramid).to(device, memory_format=layout) for _ in range(2))
        frozen.eval()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

        def train(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            with narrow():
                logits = model(inputs)
            loss = total_loss([level.float() for level in logits], targets)
            loss.backward()
            optimizer.step()
            return loss.detach()

        def predict(frozen=frozen) -> torch.Tensor:
            with torch.inference_mode(), narrow():
                return frozen(inputs)[-1]

        calls["train"][name], calls["predict"][name] = train, predict
    return calls


class TorchPyramid(nn.Module):
    """See `to_torch`.

    Args:
      networks: one a level, coarsest first: [B, C, D, H, W] -> logits [B, K, D, H, W].
      window: HU that map to -1 and 1.
    """

    def __init__(self, networks: Sequence[nn.Module], window: Sequence[float]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.window = window

    def forward(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For each level's image [B, N, N, N] in HU its logits [B, K, N, N, N]; coarsest first."""
        logits: list[torch.Tensor] = []
        for level, image in enumerate(images, start=1):
            maps = None if level == 1 else _context_of(logits[-1])
            logits.append(self.level(level, image, maps))
        return logits

    def level(self, level: int, image: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
        """Logits of one level, [B, K, D, H, W].

        Args:
          level: 1 = coarsest.
          image: [B, D, H, W] in HU.
          maps: the coarser level's softmax maps with a halo of one voxel, [B, K, D/2 + 2, H/2 + 2, W/2 + 2]; None at
            level 1.
        """
        low, high = self.window
        x = ((image - low) * (2 / (high - low)) - 1).clamp(-1, 1)[:, None]
        if maps is not None:
            # PyTorch's own interpolation is right except at the border, which the halo keeps away.
            fine = nn.functional.interpolate(maps, scale_factor=2, mode="trilinear", align_corners=False)
            x = torch.cat([x, fine[..., 2:-2, 2:-2, 2:-2]], dim=1)
        return self.networks[level - 1](x)


class _TorchUNet(nn.Module):
    def __init__(self, analysis: list[nn.Module], ups: list[nn.Module], synthesis: list[nn.Module], head: nn.Module):
        super().__init__()
        self.analysis, self.ups, self.synthesis = map(nn.ModuleList, (analysis, ups, synthesis))
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcuts: list[torch.Tensor] = []
        for blocks in self.analysis:
            if shortcuts:
                x = nn.functional.max_pool3d(x, 2)
            x = blocks(x)
            shortcuts.append(x)
        for up, blocks in zip(self.ups, self.synthesis, strict=True):
            shortcuts.pop()
            x = blocks(torch.cat([up(x), shortcuts[-1]], dim=1))
        return self.head(x)


def _unet(network: Any) -> _TorchUNet:
    """Of a `models.unet.UNet`."""
    analysis: list[nn.Module] = [nn.Sequential(*map(_block, blocks)) for blocks in network.analysis]
    ups: list[nn.Module] = [_block(up) for up, _, _ in network.synthesis]
    synthesis: list[nn.Module] = [nn.Sequential(*map(_block, blocks)) for _, *blocks in network.synthesis]
    return _TorchUNet(analysis, ups, synthesis, _layer(network.head))


def _block(block: Any) -> nn.Module:
    """Of a `models.blocks.Block`."""
    layer = _layer(block.layer)
    if block.norm is None:
        return nn.Sequential(layer, nn.ReLU(inplace=True))
    norm = nn.BatchNorm3d(block.norm.scale[...].size, eps=EPSILON, momentum=1 - block.norm.momentum)
    norm.load_state_dict(
        {
            "weight": _tensor(block.norm.scale[...]),
            "bias": _tensor(block.norm.bias[...]),
            "running_mean": _tensor(block.norm.mean[...]),
            "running_var": _tensor(block.norm.var[...]),
        },
        strict=False,  # PyTorch also counts batches
    )
    return nn.Sequential(layer, norm, nn.ReLU(inplace=True))


def _layer(layer: Any) -> nn.Module:
    """Of a `Convolution`, whose kernel is [O, k, k, k, C], or a `Deconvolution`, [2, 2, 2, O, C]."""
    kernel = _tensor(layer.kernel[...])
    made: nn.Conv3d | nn.ConvTranspose3d
    if isinstance(layer, Deconvolution):
        *_, outputs, inputs = kernel.shape
        made = nn.ConvTranspose3d(inputs, outputs, 2, stride=2, bias=False)
        values = {"weight": kernel.permute(4, 3, 0, 1, 2)}
    else:
        outputs, size, *_, inputs = kernel.shape
        made = nn.Conv3d(inputs, outputs, size, padding=size // 2, bias=layer.bias is not None)
        values = {"weight": kernel.permute(0, 4, 1, 2, 3)}
        if layer.bias is not None:
            values["bias"] = _tensor(layer.bias[...])
    made.load_state_dict(values)
    return made


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _context_of(logits: torch.Tensor) -> torch.Tensor:
    edge = logits.shape[-1]
    inner = slice(edge // 4 - 1, 3 * edge // 4 + 1)
    return logits[..., inner, inner, inner].softmax(1)


def _dice_loss(logits: torch.Tensor, labels: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    probabilities = logits.softmax(1)
    truth = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1)
    voxels = (0, 2, 3, 4)
    overlap, total = (probabilities * truth).sum(voxels), probabilities.sum(voxels) + truth.sum(voxels)
    return -((2 * overlap + eps) / (total + eps)).mean()
