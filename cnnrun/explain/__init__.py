"""What a network sees: each way of looking is a file with one function, which returns an Explanation.

After Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv 1311.2901): its
figures and tables are named where they are made again.
"""
