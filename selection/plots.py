"""Pictures of a selection; matplotlib is imported only here, and only when something is drawn."""

from typing import Any

import numpy as np

from selection.subset import Selection

CHOSEN, OTHER = '#2563eb', '#cbd5e1'


def ranking(selection: Selection, most: int = 60) -> Any:
  """A `matplotlib.figure.Figure`: the shares of the units in order, the chosen ones in colour, and the cut.

  Up to `most` units are bars with their names; more of them are a curve.
  """
  from matplotlib.figure import Figure

  order = selection.ranking()
  shares = 100 * selection.shares[order]
  chosen = len(selection.classes)
  figure = Figure(figsize=(9, 3.6), layout='constrained')
  axes = figure.subplots()
  if len(order) <= most:
    axes.bar(range(len(order)), shares, color=[CHOSEN if i < chosen else OTHER for i in range(len(order))])
    # A name with dollar signs is no formula.
    names = [selection.names[i][:24].replace('$', r'\$') for i in order]
    axes.set_xticks(range(len(order)), names, rotation=60, ha='right', rotation_mode='anchor', fontsize=8)
  else:
    axes.fill_between(np.arange(1, len(order) + 1), shares, color=OTHER, step='mid')
    axes.fill_between(np.arange(1, chosen + 1), shares[:chosen], color=CHOSEN, step='mid')
    axes.set_xlabel('source classes, by rank')
  if chosen < len(order):
    at = chosen - 0.5 if len(order) <= most else chosen + 0.5
    axes.axvline(at, color='#dc2626', linewidth=1)
    axes.annotate(f' cut after {chosen}', (at, shares.max()), color='#dc2626', fontsize=9, va='top')
  axes.set_ylabel('share of transported mass, %')
  axes.set_ylim(bottom=0)
  axes.margins(x=0.01)
  axes.spines[['top', 'right']].set_visible(False)
  return figure
