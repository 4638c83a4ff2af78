"""Charts of the HTML report as SVG: curves, bars with intervals, a reliability plot. Numbers in, `Markup` out."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

INK, GRID, CURVE, OTHER, BAND, CHANCE = "#1b1b1b", "#c4c4c4", "#1f5f9a", "#a8480c", "#b9cfe3", "#9b1c1c"
Point = Sequence[float]


def svg(width: int, height: int, label: str, *parts: str) -> Markup:
    """An SVG of parts that are escaped already."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, label, Markup("".join(parts)))


def line(x1: float, y1: float, x2: float, y2: float, color: str = INK, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width:g}"'
        f"{dashes}/>"
    )


def rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{color}"/>'


def dot(x: float, y: float, color: str = CURVE, radius: float = 3) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


def text_at(x: float, y: float, text: str, anchor: str = "start", size: int = 12, color: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-family="system-ui, sans-serif" fill="{color}">{escape(text)}</text>'
    )


class UnitSquare:
    """Axes from 0 to 1 in both directions, of `edge` units, its lower left corner at (left, bottom)."""

    def __init__(self, left: float, bottom: float, edge: float):
        self.left, self.bottom, self.edge = left, bottom, edge

    def at(self, point: Point) -> tuple[float, float]:
        return self.left + self.edge * point[0], self.bottom - self.edge * point[1]

    def frame(self, x_name: str, y_name: str) -> list[str]:
        """Frame, ticks and the names of the axes."""
        parts = [line(*self.at(start), *self.at(stop)) for start, stop in (((0, 0), (1, 0)), ((0, 0), (0, 1)))]
        for tick in (0, 0.5, 1):
            (x, _), (_, y) = self.at((tick, 0)), self.at((0, tick))
            parts += [
                line(x, self.bottom, x, self.bottom + 3),
                text_at(x, self.bottom + 14, f"{tick:g}", "middle", 10),
                line(self.left - 3, y, self.left, y),
                text_at(self.left - 5, y + 3.5, f"{tick:g}", "end", 10),
            ]
        parts.append(text_at(self.left + self.edge / 2, self.bottom + 27, x_name, "middle", 11))
        parts.append(text_at(self.left, self.bottom - self.edge - 6, y_name, "start", 11))
        return parts

    def path(self, points: Sequence[Point], color: str = CURVE, width: float = 1.8) -> str:
        shown = "L".join("{:.1f},{:.1f}".format(*self.at(point)) for point in points)
        return f'<path d="M{shown}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def curves_chart(name: str, roc: Sequence[Point], pr: Sequence[Point], share_positive: float) -> Markup:
    """ROC and precision-recall curve of one finding side by side, each with the line of chance."""
    left, right = UnitSquare(30, 150, 120), UnitSquare(200, 150, 120)
    parts = [
        *left.frame("false positive rate", "recall"),
        line(*left.at((0, 0)), *left.at((1, 1)), CHANCE, 1, "3 3"),
        left.path(roc),
        *right.frame("recall", "precision"),
        line(*right.at((0, share_positive)), *right.at((1, share_positive)), CHANCE, 1, "3 3"),
        right.path(pr),
    ]
    return svg(330, 182, f"ROC and precision-recall curve of {name}", *parts)


def reliability_chart(name: str, bins: Sequence[dict]) -> Markup:
    """Share of positives against mean score, bin by bin, over bars of how many scores a bin holds."""
    square = UnitSquare(34, 250, 230)
    most = max(entry["count"] for entry in bins)
    parts = []
    for entry in bins:
        (x, _), (end, _) = square.at((entry["low"], 0)), square.at((entry["high"], 0))
        tall = 46 * entry["count"] / most
        parts.append(rect(x + 0.5, 250 - tall, end - x - 1, tall, BAND))
    parts += square.frame("mean score", "share with the finding")
    parts.append(line(*square.at((0, 0)), *square.at((1, 1)), CHANCE, 1, "3 3"))
    points = [(entry["mean_score"], entry["share_positive"]) for entry in bins]
    parts += [square.path(points), *(dot(*square.at(point)) for point in points)]
    return svg(280, 282, f"Reliability of {name}", *parts)


def interval_chart(
    label: str,
    rows: Sequence[tuple[str, dict, Sequence[float]]],
    limits: tuple[float, float],
    chance: float,
    axis_name: str,
    ticks: Sequence[float],
    from_chance: bool = True,
) -> Markup:
    """Horizontal bars with intervals.

    Args:
        label: What it shows, for those who do not see it.
        rows: Name, figure {value, low, high} (low and high may be None) and further values, drawn as rings.
        limits: Ends of the axis.
        chance: Drawn as a line, and the start of the bars.
        axis_name, ticks: Of the axis.
        from_chance: Draw bars; otherwise only dots and intervals.
    """
    left, right, step, top = 230, 760, 22, 8
    bottom = top + step * len(rows)

    def at(value: float) -> float:
        share = (min(max(value, limits[0]), limits[1]) - limits[0]) / (limits[1] - limits[0])
        return left + (right - left) * share

    parts = []
    for tick in ticks:
        parts += [
            line(at(tick), top, at(tick), bottom, GRID),
            text_at(at(tick), bottom + 15, f"{tick:g}", "middle", 11),
        ]
    for place, (name, figure, values) in enumerate(rows):
        middle = top + step * (place + 0.5)
        parts.append(text_at(left - 8, middle + 4, name if len(name) <= 34 else name[:33] + "…", "end"))
        if figure["value"] is None:
            parts.append(text_at(at(chance) + 6, middle + 4, "not measured", size=11))
            continue
        x = at(figure["value"])
        if from_chance:
            parts.append(rect(min(x, at(chance)), middle - 7, abs(x - at(chance)), 14, BAND))
        if figure["low"] is not None:
            low, high = at(figure["low"]), at(figure["high"])
            parts.append(line(low, middle, high, middle, INK, 1.5))
            parts += [line(end, middle - 4, end, middle + 4, INK, 1.5) for end in (low, high)]
        parts += [
            f'<circle cx="{at(value):.1f}" cy="{middle:.1f}" r="3" fill="none" stroke="{OTHER}" stroke-width="1.3"/>'
            for value in values
        ]
        parts += [dot(x, middle, CURVE, 3.5), text_at(right + 10, middle + 4, f"{figure['value']:.3f}", size=11)]
    parts.append(line(at(chance), top, at(chance), bottom, CHANCE, 1.2, "4 3"))
    parts.append(text_at((left + right) / 2, bottom + 32, axis_name, "middle"))
    return svg(820, bottom + 40, label, *parts)
