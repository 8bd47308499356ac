"""Read images and questions from the files of public datasets. Needs neither NumPy nor PyTorch."""
