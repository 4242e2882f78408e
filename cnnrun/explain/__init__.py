"""What a network sees: each method is a kind with settings, and a file that draws; it returns an Explanation.

After Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv 1311.2901): its
figures and tables are named where they are made again.
"""
