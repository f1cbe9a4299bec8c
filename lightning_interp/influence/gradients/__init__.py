"""Per-sample gradients: computed by rules or `torch.func`, checked against autograd, read in batches that fit."""
