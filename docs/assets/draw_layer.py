"""Draws `declarative-layer.png`, the picture of what a declarative layer is.

python docs/assets/draw_layer.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, BLUE, ORANGE, GREY = "#1d2733", "#1f5fa8", "#c9671c", "#7b8794"
PALE_BLUE, PALE_ORANGE = "#eaf2fb", "#fdf1e4"

plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
figure = plt.figure(figsize=(9, 4.05))
axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(0, 405))
axes.axis("off")


def box(x, y, width, height, face, edge, **style):
    shape = f"round,pad=0,rounding_size={style.pop('rounding', 12)}"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=1.8, **style)
    )


def arrow(start, end, colour, bend="arc3,rad=0"):
    style = {"arrowstyle": "-|>,head_length=9,head_width=5", "linewidth": 2.6, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, color=colour, **style))


def text(x, y, string, size=12.5, colour=INK, **style):
    axes.text(x, y, string, fontsize=size, color=colour, **{"ha": "center", "va": "center", **style})


# Data on the left, solution on the right, both of them part of either direction.
box(42, 142, 96, 120, "white", INK)
text(90, 218, "$x$", 25)
text(90, 173, "data,\nparameters", 10.5, GREY)
box(762, 142, 96, 120, "white", INK)
text(812, 216, r"$y^{\!\ast}$", 25)
text(810, 173, "solution", 10.5, GREY)

# Forward: the solver, above.
box(252, 240, 396, 128, PALE_BLUE, BLUE)
text(276, 341, "Solve", 15, BLUE, ha="left", weight="bold")
text(276, 309, "by any algorithm: Newton,", ha="left")
text(276, 288, "a closed form, your own …", ha="left")
text(276, 261, "no gradient here: steps are forgotten", 10.5, GREY, ha="left", style="italic")
# The path of an iteration, closing in on a point.
path_x = [522, 624, 546, 604, 568, 588, 582]
path_y = [346, 330, 310, 297, 286, 279, 274]
axes.plot(path_x, path_y, color=GREY, linewidth=1.2, linestyle=(0, (3, 2)), marker="o", markersize=3.5)
axes.plot(path_x[-1], path_y[-1], "o", color=BLUE, markersize=8)
text(592, 266, r"$y^{\!\ast}$", 12, BLUE, ha="left")
arrow((90, 264), (246, 304), BLUE, "angle,angleA=90,angleB=0,rad=38")
arrow((654, 304), (810, 266), BLUE, "angle,angleA=0,angleB=90,rad=38")
text(166, 324, "forward", 12, BLUE, weight="bold")

# Backward: the problem, below.
box(252, 37, 396, 150, PALE_ORANGE, ORANGE)
text(276, 161, "Problem", 15, ORANGE, ha="left", weight="bold")
text(624, 161, r"$F \equiv$ optimality$(y, x) = 0$", 13.5, ha="right")
axes.plot((276, 624), (139, 139), color=ORANGE, linewidth=0.8, alpha=0.5)
text(276, 118, "differentiate it at the solution $y^{\\!\\ast}$:", ha="left")
text(450, 86, r"$\partial_y F\;\mathrm{d}y \;=\; -\,\partial_x F\;\mathrm{d}x$", 17)
text(450, 54, "one linear solve, however many steps were taken", 10.5, GREY, style="italic")
arrow((810, 140), (654, 108), ORANGE, "angle,angleA=-90,angleB=0,rad=38")
arrow((246, 108), (90, 138), ORANGE, "angle,angleA=0,angleB=-90,rad=38")
text(738, 90, "gradient", 12, ORANGE, weight="bold")

# What ties the two together.
arrow((450, 240), (450, 190), GREY)
text(464, 214, r"$y^{\!\ast}$ has to satisfy it", 10.5, GREY, ha="left")

figure.savefig(pathlib.Path(__file__).with_name("declarative-layer.png"), dpi=200, facecolor="white")
