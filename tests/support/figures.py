"""Charts as figures with their final layout, and what is in them."""

from __future__ import annotations

from yolov7_deploy._charts import chart_style

ROUNDED = 0.01  # inches


@chart_style()
def figure_of(make, *arguments):
    """Return the figure with its final layout."""
    figure = make(*arguments)
    figure.draw_without_rendering()
    return figure


def is_all_inside(figure):
    """Return whether all texts and lines are inside the figure."""
    with chart_style():
        corners = figure.get_tightbbox().get_points()
    return bool((corners[0] > -ROUNDED).all() and (corners[1] < figure.get_size_inches() + ROUNDED).all())


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line
