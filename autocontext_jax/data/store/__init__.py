"""The prepared data set: one OME-Zarr 0.5 (Zarr v3) pyramid of image and labels per case, through TensorStore."""
