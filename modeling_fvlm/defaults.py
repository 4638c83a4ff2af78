"""What both the configuration and the builders start from: crop, spacing, margin and HU window, where none is named.

The configuration is a class of transformers. A builder that asked it for these numbers would bring transformers and
PyTorch into each of its workers; so they stand here, and configuration_fvlm.py reads them as everyone does.
Axes are (depth, height, width).
"""

DEFAULT_VOLUME_SIZE = (112, 256, 352)  # the published crop, in voxels
DEFAULT_SPACING = (3.0, 1.0, 1.0)  # mm between voxel centres
DEFAULT_MARGIN_VOXELS = (5, 20, 20)  # around the box of all organs
# Lung to dense bone in one channel, as published: [-1150, 350] HU -> [0, 1].
DEFAULT_WINDOW = {"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.0, "std": 1.0}
