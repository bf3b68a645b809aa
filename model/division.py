"""What "one of S" means for every family: the width tables and rules of the paper. Arithmetic only, no modules.

Source of every table: Zhao et al., arXiv:2011.14660, and its published code's behaviour.
"""

# ---- ResNet, wide ResNet, ResNeXt ------------------------------------------------------------------------------------


# ---- SE-ResNet, SE-ResNeXt, SENet, ResNeXSt --------------------------------------------------------------------------


# ---- Shake-Shake, PyramidNet, DenseNet -------------------------------------------------------------------------------


# ---- EfficientNet ----------------------------------------------------------------------------------------------------
