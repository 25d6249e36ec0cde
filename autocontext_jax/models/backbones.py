"""The networks that a configuration can name."""

from autocontext_jax.models.fcn import FCN
from autocontext_jax.models.residual_unet import ResidualUNet
from autocontext_jax.models.unet import UNet

BACKBONES: dict[str, type] = {"unet": UNet, "residual_unet": ResidualUNet, "fcn": FCN}
