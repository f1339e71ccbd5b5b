"""Conversion of pretrained PyTorch ViT weights into checkpoint directories, without PyTorch."""
