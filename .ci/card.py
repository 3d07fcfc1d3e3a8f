"""Draw nbs/card.png, the picture that a link to the site is shown with: 1200 x 630, the first page's own figure under the name."""
import io, re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BLUE = "#0072b2"


def first_figure() -> Path:
    "The first picture of README.md, which `make readme` takes from nbs/index.ipynb."
    return ROOT / re.search(r"!\[[^\]]*\]\((index_files/[^)]+\.png)\)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]


def card() -> Image.Image:
    fig = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    fig.text(0.05, 0.845, "TreeLoRA companion", fontsize=44, fontweight="bold", color=BLUE)
    fig.text(0.05, 0.755, "The ICML 2025 paper, readable, runnable, importable:", fontsize=21, color="#373a3c")
    fig.text(0.05, 0.69, "continual learning with LoRA adapters and a tree of earlier tasks", fontsize=21, color="#373a3c")
    ax = fig.add_axes((0.03, 0.04, 0.94, 0.59))
    ax.imshow(imread(first_figure()), interpolation="antialiased")
    ax.axis("off")
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)


if __name__ == "__main__": card().save(ROOT / "nbs" / "card.png", optimize=True)
