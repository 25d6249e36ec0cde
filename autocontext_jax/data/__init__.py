"""From a folder of scans to augmented batches of pyramid patches on the device."""
