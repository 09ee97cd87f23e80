"""The Triton kernels, one file a family. They import nothing but Triton and each other: a bundle carries copies."""
