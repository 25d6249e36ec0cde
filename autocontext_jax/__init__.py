"""Multi-scale pyramids of 3D U-Nets with auto-context for CT segmentation (Roth et al., MICCAI 2018)."""
