"""Every method on more than 220 networks of timm, torchvision and segmentation_models_pytorch.

    python -m benchmarks.zoo [MODEL ...] [--jobs N] [--fresh]

See docs/zoo.md for what is counted and what was found; ``models.py`` lists the networks.
"""
