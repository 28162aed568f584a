"""Selects the pre-training data that helps a target.

    chosen = selection.select(source, target, size=100)

`source` and `target` are features of images by one encoder, with labels: `Embeddings`, or plain arrays. See `select`.
"""

from selection.embeddings import class_means, embed, embed_class_means, Embeddings
from selection.otdd import domain_similarity, otdd
from selection.result import Comparison, Selection
from selection.select import select
from selection.strategies import STRATEGIES
from selection.units import UNITS

__all__ = ['STRATEGIES', 'UNITS', 'Comparison', 'Embeddings', 'Selection', 'class_means', 'domain_similarity', 'embed',
           'embed_class_means', 'otdd', 'select']
