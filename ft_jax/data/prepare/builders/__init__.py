"""TFDS builders of image sets that TFDS lacks; sources.py names them."""
