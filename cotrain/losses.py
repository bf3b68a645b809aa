"""Every loss under one name: pure functions of tensors, one value an image. S networks, B images, K classes."""

from loss.agreement import (
    js_divergence,
    kl_mean,
    kl_seperate,
    mse_mean,
    mse_seperate,
    smooth_l1_mean,
    smooth_l1_seperate,
)
from loss.classification import cross_entropy, mixed_binary_cross_entropy, mixed_cross_entropy
from loss.contrastive import bank_contrast, batch_contrast, contrast_nll
from loss.distillation import distillation_kl, knowledge_synergy
from loss.soft_target import soft_cross_entropy

__all__ = [
    "bank_contrast",
    "batch_contrast",
    "contrast_nll",
    "cross_entropy",
    "distillation_kl",
    "js_divergence",
    "kl_mean",
    "kl_seperate",
    "knowledge_synergy",
    "mixed_binary_cross_entropy",
    "mixed_cross_entropy",
    "mse_mean",
    "mse_seperate",
    "smooth_l1_mean",
    "smooth_l1_seperate",
    "soft_cross_entropy",
]
