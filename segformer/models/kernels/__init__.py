"""Triton kernels for CUDA: plain functions on tensors, which models/ops registers with torch.

    depthwise       3x3 depthwise convolution, bias and GELU, and gradients
    resize          base + sum of enlarged maps, and gradients
    cross_entropy   cross entropy of enlarged logits with its gradient; sweep: its first kernel
    argmax          classes of enlarged logits, and their confusion matrix
    bilinear, grid  what they share

Nothing imports these modules on a machine without a GPU but tests, in Triton's interpreter. All arithmetic is
in float32; nothing is added atomically but whole numbers, and the order of sums depends on shapes alone, so
results have the same bits in every run. Block sizes follow from the shape: no autotuning, and a kernel is not
compiled again for images of another size. The features of Triton are those of 3.6 and 3.7.
"""
