"""The numbers in stored label maps.

A stored label map is uint8: 0 is the background, 1, 2, ... are the data set's other labels, and `IGNORE` marks voxels
that nobody labelled.
"""

IGNORE = 255
