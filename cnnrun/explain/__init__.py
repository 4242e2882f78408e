"""Explanations of trained networks: each method is a kind with settings and a function that returns an Explanation.

"The paper" is Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv 1311.2901).
Methods name the figure or table of it that they reproduce.
"""

__all__ = ["augmentation_sheet", "figures", "layer_names", "method_base", "methods", "run", "run_method", "subject"]
