"""Which of this pre-training data helps that target?

    chosen = selection.select(source, target, size=100)

`source` and `target` are `Embeddings`: features of images by one encoder, with labels. See `select`.
"""

from selection.embeddings import class_means, embed, embed_class_means, Embeddings
from selection.select import select, UNITS
from selection.strategies import STRATEGIES
from selection.subset import Selection

__all__ = ['STRATEGIES', 'UNITS', 'Embeddings', 'Selection', 'class_means', 'embed', 'embed_class_means', 'select']
